"""LLaMA-3, cut into pipeline stages whose pieces keep their global names.

Grouped-query attention with rotary positions, SwiGLU, RMSNorm, an output head of its own. Names are
those of the published safetensors files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

__all__ = ["SIZES", "Llama3", "Llama3Config"]


@dataclass(frozen=True, slots=True)
class Llama3Config:
    """Sizes of the model, and its dropout."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    ffn_size: int
    vocab_size: int = 128256
    block_size: int = 8192
    """Longest sequence, in tokens."""
    rope_theta: float = 500000.0
    rope_factor: float = 1.0
    """By how much slow rotations are slowed down further; 1 leaves them."""
    norm_eps: float = 1e-5
    dropout: float = 0.0

    def facts(self) -> dict[str, object]:
        """What must be the same for a checkpoint to be this model's."""
        sizes = {name: size for name, size in asdict(self).items() if name != "dropout"}
        return {"model": "llama3", **sizes}

    def build(self, layers: range) -> Llama3:
        """The stage that holds these layers."""
        return Llama3(self, layers)


SIZES = {
    "tiny": Llama3Config(
        n_layer=4, n_head=4, n_kv_head=2, n_embd=64, ffn_size=160, vocab_size=256, block_size=64
    ),
    "1B": Llama3Config(
        n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, ffn_size=8192, rope_factor=32.0
    ),
    "3B": Llama3Config(
        n_layer=28, n_head=24, n_kv_head=8, n_embd=3072, ffn_size=8192, rope_factor=32.0
    ),
    "8B": Llama3Config(n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, ffn_size=14336),
}


class Attention(nn.Module):
    """Causal self-attention; under tensor parallelism a rank sees its own heads only."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.n_embd // config.n_head
        kv_size = config.n_kv_head * self.head_size
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_size, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_size, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, self.config), rotate(k, self.config)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(x: Tensor, config: Llama3Config) -> Tensor:
    """Turn queries or keys ``[batch, head, position, size]`` by an angle for each position."""
    cos, sin = angles(x.shape[-2], x.shape[-1], config, x.device)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


@cache
def angles(
    length: int, head_size: int, config: Llama3Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each ``[position, size / 2]``."""
    exponents = torch.arange(0, head_size, 2, device=device).float() / head_size
    frequencies = 1.0 / config.rope_theta**exponents
    # Rotations slower than once in the length that the model was first trained on are slowed down
    # by the factor, those faster than four times in it are left, those between are blended.
    turns = 8192 * frequencies / (2 * math.pi)
    blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
    frequencies = frequencies * (blend + (1 - blend) / config.rope_factor)
    product = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return product.cos(), product.sin()


class MLP(nn.Module):
    """SwiGLU: one projection, gated by another."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Each position for itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the perceptron, each on a residual path."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x)))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama3(nn.Module):
    """One pipeline stage of the model; the whole of it if it has all layers.

    Layers are keyed by their *global* index, as in ``gpt2.py``.
    """

    input_embedding, output_head = "model.embed_tokens.weight", "lm_head.weight"
    is_tied = False

    def __init__(self, config: Llama3Config, layers: range) -> None:
        super().__init__()
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.n_layer
        pieces: dict[str, nn.Module] = {}
        if self.is_first:
            pieces["embed_tokens"] = nn.Embedding(config.vocab_size, config.n_embd)
        pieces["layers"] = nn.ModuleDict({str(i): Block(config) for i in layers})
        if self.is_last:
            pieces["norm"] = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.model = nn.ModuleDict(pieces)

    def tie(self) -> None:
        """Nothing is tied."""

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of this stage."""
        return list(self.model["layers"].children())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to hidden state (first stage), hidden state to logits (last stage)."""
        if self.is_first:
            x = self.model["embed_tokens"](x)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.model["norm"](x)) if self.is_last else x

    def tensor_parallel_plan(self, *, is_sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """How this stage is split over ranks: name of a module → what becomes of it.

        Between the split modules the hidden state is whole on every rank, or, with sequence
        parallelism, cut along the sequence.
        """
        between = Shard(1) if is_sequence_parallel else Replicate()
        plan: dict[str, ParallelStyle] = {}
        if self.is_first:
            plan["model.embed_tokens"] = RowwiseParallel(
                input_layouts=Replicate(), output_layouts=between
            )
        for number in self.model["layers"]:
            layer = f"model.layers.{number}"
            for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
                plan[f"{layer}.{name}_proj"] = ColwiseParallel()
            for name in ("self_attn.o", "mlp.down"):
                plan[f"{layer}.{name}_proj"] = RowwiseParallel(output_layouts=between)
            if is_sequence_parallel:
                for name in ("self_attn", "mlp"):
                    plan[f"{layer}.{name}"] = PrepareModuleInput(
                        input_layouts=between, desired_input_layouts=Replicate()
                    )
                for name in ("input_layernorm", "post_attention_layernorm"):
                    plan[f"{layer}.{name}"] = SequenceParallel()
        if self.is_last:
            plan["lm_head"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
            if is_sequence_parallel:
                plan["model.norm"] = SequenceParallel()
        return plan
