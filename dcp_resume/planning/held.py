"""One tensor leaf, and the memory in which a rank holds parts of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.flattening import Path, fqn_of, part_of
from dcp_resume.planning.placements import HeldBox

__all__ = ["HeldPiece", "HeldTensor", "PlacedTensor", "narrowed", "place_whole", "plain_entry"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|decoder)\.(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """A box of the whole tensor, and the rank's memory of it."""

    box: Box
    memory: torch.Tensor
    """A view of the trainer's memory, of the box's shape."""

    def view(self, box: Box) -> torch.Tensor:
        """The memory of a box inside of it."""
        if box == self.box:
            return self.memory
        return narrowed(self.memory, box.relative_to(self.box))


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """One tensor leaf, and the boxes of it in this rank's memory."""

    entry: TensorEntry
    pieces: tuple[HeldPiece, ...]
    """None where the rank holds nothing of it."""

    @classmethod
    def of(cls, entry: TensorEntry, local: torch.Tensor, boxes: Sequence[HeldBox]) -> HeldTensor:
        """A tensor whose boxes lie in one local tensor."""
        return PlacedTensor.in_boxes(entry, boxes).hold(local)

    @property
    def is_declared(self) -> bool:
        """Whether a declared layout says how it lies, instead of placements or nothing."""
        return self.entry.mesh is not None and self.entry.placements is None

    def view(self, box: Box) -> torch.Tensor:
        """The memory of ``box``, which must lie in one held box.

        Raises:
            LookupError: No held box contains ``box``.
        """
        return self.pieces[self.piece_of(box)].view(box)

    def piece_of(self, box: Box) -> int:
        """Which piece ``box`` lies in.

        Raises:
            LookupError: No held box contains ``box``.
        """
        for number, piece in enumerate(self.pieces):
            if piece.box.contains(box):
                return number
        raise LookupError(f"{self.entry.fqn}: this rank does not hold {box}")


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """One tensor leaf, and where it lies on this rank; nothing of its memory."""

    entry: TensorEntry
    cut: Callable[[torch.Tensor], Iterable[HeldPiece]]
    """Makes the pieces out of the leaf's local memory."""

    @classmethod
    def in_boxes(cls, entry: TensorEntry, boxes: Sequence[HeldBox]) -> PlacedTensor:
        """A tensor whose boxes lie in one local tensor."""
        return cls(entry, partial(_cut_boxes, tuple(boxes)))

    def hold(self, local: torch.Tensor) -> HeldTensor:
        """The same with the rank's memory of it."""
        memory = local.detach() if local.requires_grad else local
        return HeldTensor(self.entry, tuple(self.cut(memory)))


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


def place_whole(entry: TensorEntry) -> PlacedTensor:
    """A tensor that the rank holds whole."""
    box = Box.whole(entry.global_shape)
    return PlacedTensor.in_boxes(entry, (HeldBox(box, box.offsets),))


def narrowed(memory: torch.Tensor, box: Box) -> torch.Tensor:
    """The view of a box, counted from the memory's first element."""
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        memory = memory.narrow(dim, offset, size)
    return memory


def _cut_boxes(boxes: Sequence[HeldBox], memory: torch.Tensor) -> list[HeldPiece]:
    return [HeldPiece(held.box, _memory(memory, held)) for held in boxes]


def _memory(local: torch.Tensor, held: HeldBox) -> torch.Tensor:
    if held.box.sizes == local.shape:
        return local
    if not held.box.volume:  # of an empty tensor each rank holds the whole, whatever it has locally
        return local.new_empty(held.box.sizes)
    return narrowed(local, Box(held.local_offsets, held.box.sizes))
