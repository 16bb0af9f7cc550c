"""What is saved: the shards of a Llama-like model with AdamW's moments, in random numbers.

Random, never zeros: zeros compress, and pages of them may cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

__all__ = ["SIZES", "Size", "State", "blank_state", "make_state", "memory_of", "num_bytes"]

State = dict[str, Any]
Shape = tuple[int, ...]

PIECES = 8
"""Of a split dim, drawn one by one; divides by every world size used."""


@dataclass(frozen=True)
class Size:
    """A payload, and on how many ranks it is saved and loaded."""

    name: str
    ranks: int
    other_ranks: tuple[int, ...]
    """World sizes that it is loaded on besides."""
    width: int
    hidden: int
    layers: int
    vocabulary: int
    dtype: torch.dtype

    def shapes(self) -> dict[str, tuple[Shape, int | None]]:
        """FQN → global shape, and the tensor dim that TP splits."""
        d, h, v = self.width, self.hidden, self.vocabulary
        shapes: dict[str, tuple[Shape, int | None]] = {"embed.weight": ((v, d), 0)}
        for layer in range(self.layers):
            at = f"layers.{layer}."
            for name in ("wq", "wk", "wv"):
                shapes[f"{at}attention.{name}.weight"] = ((d, d), 0)
            shapes[f"{at}attention.wo.weight"] = ((d, d), 1)
            shapes[f"{at}feed_forward.w1.weight"] = ((h, d), 0)
            shapes[f"{at}feed_forward.w2.weight"] = ((d, h), 1)
            shapes[f"{at}feed_forward.w3.weight"] = ((h, d), 0)
            shapes[f"{at}attention_norm.weight"] = ((d,), None)
            shapes[f"{at}ffn_norm.weight"] = ((d,), None)
        shapes["norm.weight"] = ((d,), None)
        shapes["head.weight"] = ((v, d), 0)
        return shapes


SIZES = {
    size.name: size
    for size in (
        Size("tensor-bound", 4, (2, 1), 512, 1408, 12, 8192, torch.float32),
        Size("byte-bound", 2, (4, 1), 1536, 4096, 12, 8192, torch.bfloat16),
        Size("one-rank", 1, (), 1024, 2816, 12, 8192, torch.bfloat16),
        Size("bucket", 1, (), 512, 1408, 12, 8192, torch.bfloat16),
        Size("tiny", 2, (1,), 64, 128, 2, 256, torch.float32),
    )
}


def make_state(size: Size, mesh: DeviceMesh, *, seed: int) -> State:
    """This rank's shards: 4 tensors a parameter (weight, two moments, a step count).

    Args:
        size: Shapes and dtype.
        mesh: One axis, over which TP splits.
        seed: Of the numbers. Replicated tensors are equal on all ranks.
    """
    model: dict[str, torch.Tensor] = {}
    optim: dict[str, dict[str, torch.Tensor]] = {}
    for index, (fqn, (shape, dim)) in enumerate(size.shapes().items()):
        generator = torch.Generator()

        def draw(
            kind: int, shape: Shape = shape, dim: int | None = dim, at: int = index
        ) -> DTensor:
            seeds = (seed * 1_000_000 + at * 1000 + kind * 100 + piece for piece in range(PIECES))
            pieces = [
                _random(shape, dim, generator.manual_seed(own)).to(size.dtype)  # noqa: B023
                for own in _mine(list(seeds), mesh, dim)
            ]
            local = torch.cat(pieces, dim) if dim is not None else pieces[0]
            placement = Replicate() if dim is None else Shard(dim)
            return DTensor.from_local(local, mesh, [placement], run_check=False)

        model[fqn] = draw(0)
        step = torch.tensor(float(seed))
        optim[fqn] = {"exp_avg": draw(1), "exp_avg_sq": draw(2), "step": step}
    return {"model": model, "optim": {"state": optim}}


def _random(shape: Shape, dim: int | None, generator: torch.Generator) -> torch.Tensor:
    sizes = [size // PIECES if at == dim else size for at, size in enumerate(shape)]
    return torch.randn(sizes, generator=generator)


def _mine(seeds: list[int], mesh: DeviceMesh, dim: int | None) -> list[int]:
    """The pieces of this rank, so that the whole is the same whatever the mesh."""
    if dim is None:
        return seeds[:1]
    share = PIECES // mesh.size()
    return seeds[dist.get_rank() * share :][:share]


def blank_state(state: State) -> State:
    """Zeros in the same shapes and meshes, in memory of their own."""
    return {
        key: blank_state(value)
        if isinstance(value, dict)
        else torch.empty_like(value).fill_(0)  # touches the pages, as zeros would not
        for key, value in state.items()
    }


def memory_of(state: State) -> Iterator[torch.Tensor]:
    """Every local tensor of a state, in its order."""
    for value in state.values():
        if isinstance(value, dict):
            yield from memory_of(value)
        else:
            yield value.to_local() if isinstance(value, DTensor) else value


def num_bytes(size: Size) -> int:
    """Unique bytes of the whole payload."""
    volume = sum(math.prod(shape) for shape, _ in size.shapes().values())
    return 3 * volume * size.dtype.itemsize + 4 * len(size.shapes())
