"""What a rank writes where: all of its data files but the bytes of their chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcp_resume.format.data_file import ChunkHeader, header_bytes
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.plans import RankPlan
from dcp_resume.session.box_digests import digest_row_major

__all__ = ["PlacedChunk", "PlacedFiles"]


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """One planned chunk, without its bytes: its line of the header, and what it is cut from."""

    fqn: str
    line: ChunkHeader
    shape: tuple[int, ...] | None = None
    """Of the tensor that it is cut from, without padding; None where it is no part of one that the
    ranks share: packed values, a rank's own tensor."""

    def digest(self, data: memoryview) -> PositionDigest:
        """Its part of the tensor's digest, that of no element where there is no such tensor."""
        if self.shape is None:
            return PositionDigest()
        box = Box(self.line.offsets, self.line.sizes)
        return digest_row_major(data, ITEMSIZES[self.line.dtype], box, self.shape)


@dataclass(frozen=True, slots=True)
class PlacedFiles:
    """A rank's files, in the order of its plan."""

    names: tuple[str, ...]
    parts: tuple[str, ...]
    headers: tuple[bytes, ...]
    chunks: tuple[tuple[PlacedChunk, ...], ...]
    """Per file, in file order."""

    @classmethod
    def of(cls, plan: RankPlan, chunks: Sequence[PlacedChunk]) -> PlacedFiles:
        """Put the chunks, which come in the order of the plan, into its files."""
        own: list[list[PlacedChunk]] = [[] for _ in plan.files]
        for file, chunk in zip(plan.file.tolist(), chunks, strict=True):
            own[file].append(chunk)
        return cls(
            tuple(file.name for file in plan.files),
            tuple(file.part for file in plan.files),
            tuple(header_bytes([chunk.line for chunk in file]) for file in own),
            tuple(map(tuple, own)),
        )
