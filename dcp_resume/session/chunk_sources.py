"""Where the bytes of a rank's planned chunks are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from dcp_resume.format.data_file import ChunkHeader
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.held import HeldTensor, narrowed
from dcp_resume.planning.padding import logical_shape
from dcp_resume.planning.plans import RankPlan
from dcp_resume.planning.state import PER_RANK_LEAVES
from dcp_resume.session.placed_files import PlacedChunk, PlacedFiles

__all__ = ["ChunkSource", "PlacedMemory", "RankSource"]


class ChunkSource(Protocol):
    """Where a rank's plan finds its bytes."""

    def collect(self, plan: RankPlan) -> tuple[PlacedFiles, Sequence[torch.Tensor]]:
        """The planned files, and the memory of each chunk, in the order of the plan."""


class _Origin(NamedTuple):
    """The part of a rank's state that one chunk is."""

    tensor: int
    piece: int
    box: Box | None
    """In the piece; None for all of it."""


class _Leaves(NamedTuple):
    """Packed values, which have no memory of their own."""

    part: str | None
    """Whose per-rank values they are; None for values that all ranks share."""
    key: str
    """In the file."""


class PlacedMemory:
    """The files of one agreed plan, worked out by the first save. It keeps no tensor alive."""

    def __init__(self) -> None:
        self.files: PlacedFiles | None = None
        self.origins: Sequence[_Origin | _Leaves] = ()


@dataclass(frozen=True, slots=True)
class RankSource:
    """The bytes of a rank's described state."""

    tensors: Sequence[HeldTensor]
    """In the order of the rank's structure."""
    per_rank_leaves: Mapping[str, bytes]
    """Part → packed per-rank values; their entries follow the tensors in the structure."""
    memory: PlacedMemory = field(default_factory=PlacedMemory)
    """Of the plan that is collected, and of no other."""

    def collect(self, plan: RankPlan) -> tuple[PlacedFiles, Sequence[torch.Tensor]]:
        """The planned files, and the memory of each chunk, in the order of the plan."""
        files = self.memory.files
        if files is None:
            origins, chunks = zip(*self._place(plan), strict=True) if len(plan.file) else ((), ())
            files = PlacedFiles.of(plan, chunks)
            self.memory.files, self.memory.origins = files, origins
        return files, [self._view(origin, plan) for origin in self.memory.origins]

    def _view(self, origin: _Origin | _Leaves, plan: RankPlan) -> torch.Tensor:
        if isinstance(origin, _Leaves):
            own = self.per_rank_leaves
            data = plan.inline[origin.key] if origin.part is None else own[origin.part]
            return torch.frombuffer(bytearray(data), dtype=torch.uint8)
        tensor, piece, box = origin
        memory = self.tensors[tensor].pieces[piece].memory
        return memory if box is None else narrowed(memory, box)

    def _place(self, plan: RankPlan) -> Iterator[tuple[_Origin | _Leaves, PlacedChunk]]:
        parts: list[str | None] = [*self.per_rank_leaves]
        fqns = [held.entry.fqn for held in self.tensors]
        fqns += [PER_RANK_LEAVES + part for part in self.per_rank_leaves]
        for local, fqn, key, offsets, sizes in plan.rows(fqns):
            if not 0 <= local < len(self.tensors):
                line = ChunkHeader(key, "uint8", tuple(sizes[:1]), tuple(offsets[:1]))
                part = None if local < 0 else parts[local - len(self.tensors)]
                yield _Leaves(part, key), PlacedChunk(fqn, line)
                continue
            held = self.tensors[local]
            entry = held.entry
            is_stacked = entry.kind == "per_rank"
            ndim = len(entry.global_shape) + is_stacked
            box = Box(tuple(offsets[:ndim]), tuple(sizes[:ndim]))
            line = ChunkHeader(key, entry.dtype, box.sizes, box.offsets)
            if is_stacked:
                yield _Origin(local, 0, None), PlacedChunk(fqn, line)
            else:
                piece = held.piece_of(box)
                outer = held.pieces[piece].box
                inner = None if box == outer else box.relative_to(outer)
                yield _Origin(local, piece, inner), PlacedChunk(fqn, line, logical_shape(entry))
