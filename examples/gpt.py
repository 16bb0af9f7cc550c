"""A small byte-level GPT whose pieces keep their global names wherever they are placed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

__all__ = ["GPT", "Shape"]

NUM_BYTES = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the default has half a million parameters."""

    num_layers: int = 4
    num_heads: int = 4
    width: int = 96
    context: int = 64


class Attention(nn.Module):
    """Causal self-attention; under tensor parallelism a rank sees its own heads only."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.width // shape.num_heads
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, shape.width, bias=False)
        self.v = nn.Linear(shape.width, shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer: attention, then a two-layer perceptron, each on a residual path."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """One pipeline stage of the model; the whole of it when there is one stage.

    Layers are keyed by their *global* index, so that layer 3 is ``layers.3`` on every stage of
    every layout: with local indices, a checkpoint of two stages would hold ``layers.0`` twice.
    """

    def __init__(self, shape: Shape, *, stage: int = 0, num_stages: int = 1) -> None:
        super().__init__()
        is_first, is_last = stage == 0, stage == num_stages - 1
        # Everything is made, then the other stages' pieces are dropped: each piece thus draws the
        # same initial numbers whatever the layout.
        position = nn.Embedding(shape.context, shape.width)
        embed = nn.Embedding(NUM_BYTES, shape.width)
        layers = {str(i): Block(shape) for i in range(shape.num_layers)}
        norm, head = nn.LayerNorm(shape.width), nn.Linear(shape.width, NUM_BYTES, bias=False)
        self.position = position if is_first else None
        self.embed = embed if is_first else None
        self.layers = nn.ModuleDict(
            {
                name: layer
                for name, layer in layers.items()
                if int(name) * num_stages // shape.num_layers == stage
            }
        )
        self.norm = norm if is_last else None
        self.head = head if is_last else None

    def forward(self, x: Tensor) -> Tensor:
        """Bytes to hidden state (first stage), hidden state to logits (last stage)."""
        if self.embed is not None and self.position is not None:
            x = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for layer in self.layers.values():
            x = layer(x)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x
