"""Wanted boxes × stored chunks → the overlaps to copy. This is all that resharding is.

Pure arrays; one vectorised intersection a wanted box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.manifest.boxes import Box

__all__ = ["Overlap", "Wanted", "find_overlaps"]


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
    found: list[Overlap] = []
    for want in wanted:
        chunks = index.chunks_of(want.tensor)
        if want.box.volume == 0 or not len(chunks):
            continue
        ndim = len(want.box.offsets)
        offsets = index.box_offsets[index.chunk_box[chunks]][:, :ndim]
        sizes = index.box_sizes[index.chunk_box[chunks]][:, :ndim]
        low = np.maximum(offsets, np.asarray(want.box.offsets, np.int64))
        high = np.minimum(offsets + sizes, np.asarray(want.box.stops, np.int64))
        hits = np.flatnonzero((high > low).all(axis=1))
        for hit in hits.tolist():
            box = Box(tuple(low[hit].tolist()), tuple((high[hit] - low[hit]).tolist()))
            chunk = Box(tuple(offsets[hit].tolist()), tuple(sizes[hit].tolist()))
            found.append(
                Overlap(
                    target=want.target,
                    chunk=int(chunks[hit]),
                    box=box,
                    in_chunk=box.relative_to(chunk),
                    in_target=box.relative_to(want.box),
                )
            )
    return found
