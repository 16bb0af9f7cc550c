"""One tensor leaf, and the memory in which a rank holds parts of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.flattening import Path, fqn_of, part_of
from dcp_resume.planning.placements import HeldBox

__all__ = ["HeldPiece", "HeldTensor", "hold_whole", "narrowed", "plain_entry"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|decoder)\.(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """A box of the whole tensor, and the rank's memory of it."""

    box: Box
    memory: torch.Tensor
    """A view of the trainer's memory, of the box's shape."""


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One tensor leaf, and the boxes of it in this rank's memory."""

    entry: TensorEntry
    pieces: tuple[HeldPiece, ...]
    """None where the rank holds nothing of it."""

    @classmethod
    def of(cls, entry: TensorEntry, local: torch.Tensor, boxes: Sequence[HeldBox]) -> HeldTensor:
        """A tensor whose boxes lie in one local tensor."""
        memory = local.detach()
        return cls(entry, tuple(HeldPiece(held.box, _memory(memory, held)) for held in boxes))

    @property
    def is_declared(self) -> bool:
        """Whether a declared layout says how it lies, instead of placements or nothing."""
        return self.entry.mesh is not None and self.entry.placements is None

    def view(self, box: Box) -> torch.Tensor:
        """The memory of ``box``, which must lie in one held box.

        Raises:
            LookupError: No held box contains ``box``.
        """
        for piece in self.pieces:
            if piece.box.contains(box):
                return narrowed(piece.memory, box.relative_to(piece.box))
        raise LookupError(f"{self.entry.fqn}: this rank does not hold {box}")


def plain_entry(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> TensorEntry:
    """What the catalog says of a tensor that every rank holds whole."""
    fqn = fqn_of(path)
    layer = _LAYER.search(fqn)
    return TensorEntry(
        fqn=fqn,
        path=path,
        part=part_of(path),
        dtype=str(dtype).removeprefix("torch."),
        global_shape=tuple(int(size) for size in shape),
        kind="replicated",
        layer=int(layer[1]) if layer else None,
    )


def hold_whole(entry: TensorEntry, tensor: torch.Tensor) -> HeldTensor:
    """A tensor that the rank holds whole."""
    return HeldTensor(entry, (HeldPiece(Box.whole(entry.global_shape), tensor.detach()),))


def narrowed(memory: torch.Tensor, box: Box) -> torch.Tensor:
    """The view of a box, counted from the memory's first element."""
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        memory = memory.narrow(dim, offset, size)
    return memory


def _memory(local: torch.Tensor, held: HeldBox) -> torch.Tensor:
    if not held.box.volume:  # of an empty tensor each rank holds the whole, whatever it has locally
        return local.new_empty(held.box.sizes)
    if held.box.sizes == tuple(local.shape):
        return local
    return narrowed(local, Box(held.local_offsets, held.box.sizes))
