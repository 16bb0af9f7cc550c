"""Wanted boxes × stored chunks → the overlaps to copy. This is all that resharding is.

Pure arrays; all wanted boxes are intersected at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.box_rows import pad_boxes

__all__ = ["Overlap", "Wanted", "find_overlaps"]

PAIRS_AT_ONCE = 2**18
"""Of a wanted box and a chunk of its tensor; some hundred bytes each."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of a stored tensor that a rank wants in its memory."""

    target: int
    """Which of the caller's destinations it goes to."""
    tensor: int
    """Position of the stored tensor in the catalog."""
    box: Box
    """In the coordinates of the stored tensor."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A box that a stored chunk and a wanted box share."""

    target: int
    chunk: int
    """Position of the chunk in the index."""
    box: Box
    """Global coordinates."""
    in_chunk: Box
    """Counted from the chunk's first element."""
    in_target: Box
    """Counted from the wanted box's first element."""


def find_overlaps(wanted: Sequence[Wanted], index: ChunkIndex) -> list[Overlap]:
    """Find every overlap, in the order of ``wanted`` and then of the index.

    The overlaps of one wanted box tile it, because the chunks of a checked index tile their tensor.
    """
    live = [want for want in wanted if want.box.volume]
    _, counts = index.chunks_of_each([want.tensor for want in live])
    group = np.cumsum(counts) // PAIRS_AT_ONCE
    bounds = [*np.flatnonzero(np.diff(group, prepend=-1)).tolist(), len(live)]
    return [found for a, b in pairwise(bounds) for found in _overlaps(live[a:b], index)]


def _overlaps(wanted: Sequence[Wanted], index: ChunkIndex) -> Iterator[Overlap]:
    chunks, counts = index.chunks_of_each([want.tensor for want in wanted])
    number = np.repeat(np.arange(len(wanted)), counts)
    boxes = index.chunk_box[chunks]
    begin, size = index.box_offsets[boxes], index.box_sizes[boxes]
    asked, extent = pad_boxes([want.box for want in wanted], begin.shape[1])
    low = np.maximum(begin, asked[number])
    high = np.minimum(begin + size, (asked + extent)[number])
    hits = np.flatnonzero((high > low).all(axis=1))
    rows = zip(
        number[hits].tolist(),
        chunks[hits].tolist(),
        low[hits].tolist(),
        (high - low)[hits].tolist(),
        (low - begin)[hits].tolist(),
        (low - asked[number])[hits].tolist(),
        strict=True,
    )
    for position, chunk, offsets, sizes, in_chunk, in_target in rows:
        want = wanted[position]
        ndim = len(want.box.offsets)
        shape = tuple(sizes[:ndim])
        yield Overlap(
            target=want.target,
            chunk=chunk,
            box=Box(tuple(offsets[:ndim]), shape),
            in_chunk=Box(tuple(in_chunk[:ndim]), shape),
            in_target=Box(tuple(in_target[:ndim]), shape),
        )
