"""Foreign files that are to be written: a list of segments, whose tensors stream by in windows."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from dcp_resume.planning.flattening import Path
from dcp_resume.session.targets import Target
from dcp_resume.session.windows import StoredBox, cut_windows

__all__ = ["Checksum", "Outgoing", "OutgoingFile", "OutgoingTensor", "Segment"]


@dataclass(frozen=True, slots=True)
class Checksum:
    """Four bytes: the CRC-32 of a segment before it, by its position."""

    of: int


Segment: TypeAlias = bytes | StoredBox | Checksum


@dataclass(frozen=True, slots=True)
class OutgoingTensor:
    """A tensor under its name in the foreign checkpoint."""

    name: str
    path: Path
    fqn: str
    """Where its bytes are read."""
    dtype: str
    shape: tuple[int, ...]
    stored: StoredBox


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is to be exported."""

    tensors: tuple[OutgoingTensor, ...]
    values: Mapping[str, tuple[Path, Any]]
    """Name → path, and the value itself."""
    ties: Mapping[str, tuple[Path, str]]
    """Further name → its path, and the name of the tensor that it is."""
    step: int
    trainer: Mapping[str, Any]
    model: Mapping[str, Any]
    shard_bytes: int


@dataclass(frozen=True, slots=True)
class OutgoingFile:
    """One foreign file."""

    key: str
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(segment_size, self.segments))

    def buffers(
        self, memory: memoryview, fill: Callable[[Sequence[Target]], object]
    ) -> Iterator[memoryview]:
        """Its bytes; ``fill`` reads the tensors, window by window, into ``memory``."""
        boxes = [s for s in self.segments if isinstance(s, StoredBox)]
        pieces = _pieces(boxes, memory, fill)
        checksums: dict[int, int] = {}
        for position, segment in enumerate(self.segments):
            if isinstance(segment, bytes):
                yield memoryview(segment)
            elif isinstance(segment, Checksum):
                yield memoryview(checksums[segment.of].to_bytes(4, "little"))
            else:
                left, crc = segment_size(segment), 0
                while left:
                    piece = next(pieces)
                    crc = zlib.crc32(piece, crc)
                    left -= len(piece)
                    yield piece
                checksums[position] = crc


def segment_size(segment: Segment) -> int:
    """Bytes of a segment."""
    if isinstance(segment, bytes):
        return len(segment)
    if isinstance(segment, Checksum):
        return 4
    return math.prod(segment.box.sizes) * segment.itemsize


def shifted(segments: Sequence[Segment], by: int) -> list[Segment]:
    """The same segments behind ``by`` others."""
    return [replace(s, of=s.of + by) if isinstance(s, Checksum) else s for s in segments]


def _pieces(
    boxes: Sequence[StoredBox], memory: memoryview, fill: Callable[[Sequence[Target]], object]
) -> Iterator[memoryview]:
    for window in cut_windows(boxes, memory):
        fill(window.targets)
        for target in window.targets:
            yield target.memory
