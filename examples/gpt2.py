"""GPT-2, cut into pipeline stages whose pieces keep their global names."""

from __future__ import annotations

from dataclasses import asdict, dataclass

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

__all__ = ["GPT2", "SIZES", "GPT2Config"]


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """Sizes of the model, and its dropout."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int = 50257
    block_size: int = 1024
    """Longest sequence, in tokens."""
    dropout: float = 0.0

    @property
    def n_kv_head(self) -> int:
        """Each head has keys and values of its own."""
        return self.n_head

    def facts(self) -> dict[str, object]:
        """What must be the same for a checkpoint to be this model's."""
        sizes = {name: size for name, size in asdict(self).items() if name != "dropout"}
        return {"model": "gpt2", "n_kv_head": self.n_kv_head, **sizes}

    def build(self, layers: range) -> GPT2:
        """The stage that holds these layers."""
        return GPT2(self, layers)


SIZES = {
    "tiny": GPT2Config(n_layer=4, n_head=4, n_embd=64, vocab_size=256, block_size=64),
    "d12": GPT2Config(n_layer=12, n_head=12, n_embd=768),
    "d24": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "d36": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "d48": GPT2Config(n_layer=48, n_head=25, n_embd=1600),
}
SIZES |= {
    size: SIZES[depth]
    for size, depth in {"124M": "d12", "350M": "d24", "774M": "d36", "1558M": "d48"}.items()
}


class Attention(nn.Module):
    """Causal self-attention; under tensor parallelism a rank sees its own heads only.

    The rows of ``c_attn`` lie head by head, each head's q, k and v together, and not all q before
    all k as in the published files: so a shard of neighbouring rows is a set of whole heads, and
    the packed matrix is an ordinary sharded tensor for any number of ranks.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.head_size = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each position with those before it."""
        heads = self.c_attn(x).unflatten(-1, (-1, 3, self.head_size))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(-2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A perceptron of two layers."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Each position for itself."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then the perceptron, each on a residual path."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """One pipeline stage of the model; the whole of it if it has all layers.

    Layers are keyed by their *global* index, so that layer 3 is ``h.3`` on every stage of every
    layout: with local indices, a checkpoint of two stages would hold ``h.0`` twice.
    """

    input_embedding, output_head = "transformer.wte.weight", "lm_head.weight"
    is_tied = True
    """The output head is the input embedding, also where they lie on two stages."""

    def __init__(self, config: GPT2Config, layers: range) -> None:
        super().__init__()
        self.is_first, self.is_last = layers.start == 0, layers.stop == config.n_layer
        pieces: dict[str, nn.Module] = {}
        if self.is_first:
            pieces["wte"] = nn.Embedding(config.vocab_size, config.n_embd)
            pieces["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        pieces["h"] = nn.ModuleDict({str(i): Block(config) for i in layers})
        if self.is_last:
            pieces["ln_f"] = nn.LayerNorm(config.n_embd)
        self.transformer = nn.ModuleDict(pieces)
        if self.is_last:  # after the embedding, whose name is the first of the two
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.tie()

    def tie(self) -> None:
        """Make the output head the input embedding, where this stage has both."""
        if self.is_first and self.is_last:
            self.lm_head.weight = self.transformer["wte"].weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers of this stage."""
        return list(self.transformer["h"].children())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to hidden state (first stage), hidden state to logits (last stage)."""
        if self.is_first:
            positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
            embedded = self.transformer["wte"](x) + self.transformer["wpe"](positions)
            x = self.dropout(embedded)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x)) if self.is_last else x

    def tensor_parallel_plan(self, *, is_sequence_parallel: bool) -> dict[str, ParallelStyle]:
        """How this stage is split over ranks: name of a module → what becomes of it.

        Between the split modules the hidden state is whole on every rank, or, with sequence
        parallelism, cut along the sequence.
        """
        between = Shard(1) if is_sequence_parallel else Replicate()
        plan: dict[str, ParallelStyle] = {}
        if self.is_first:
            for name in ("wte", "wpe"):
                plan[f"transformer.{name}"] = RowwiseParallel(
                    input_layouts=Replicate(), output_layouts=between
                )
        for number in self.transformer["h"]:
            layer = f"transformer.h.{number}"
            for inner, first in (("attn", "c_attn"), ("mlp", "c_fc")):
                plan[f"{layer}.{inner}.{first}"] = ColwiseParallel()
                plan[f"{layer}.{inner}.c_proj"] = RowwiseParallel(output_layouts=between)
                if is_sequence_parallel:
                    plan[f"{layer}.{inner}"] = PrepareModuleInput(
                        input_layouts=between, desired_input_layouts=Replicate()
                    )
            if is_sequence_parallel:
                plan |= {f"{layer}.ln_1": SequenceParallel(), f"{layer}.ln_2": SequenceParallel()}
        if self.is_last:
            plan["lm_head"] = ColwiseParallel(input_layouts=between, output_layouts=Replicate())
            if is_sequence_parallel:
                plan["transformer.ln_f"] = SequenceParallel()
        return plan
