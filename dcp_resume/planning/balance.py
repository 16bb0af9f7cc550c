"""One writer for every chunk, and bytes even over the ranks. Pure integers.

Largest first, each chunk goes to its least loaded holder (LPT: at most 4/3 of the best makespan,
Graham 1969). A chunk too large for that is cut by rows and shared, so that its holders end level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["assign_writers", "share_rows"]

I64 = npt.NDArray[np.int64]


def share_rows(num_rows: int, row_bytes: int, loads: Sequence[int]) -> list[int]:
    """Rows of one replicated chunk for each holder, so that the holders end as level as rows allow.

    Args:
        num_rows: Rows of the chunk (its size in tensor dim 0).
        row_bytes: Bytes of a row.
        loads: Bytes that each holder already writes.

    Returns:
        Rows for each holder; they sum to ``num_rows``.
    """
    order = sorted(range(len(loads)), key=lambda holder: (loads[holder], holder))
    total = num_rows * row_bytes
    level, count = 0.0, 0
    running = 0
    for count, holder in enumerate(order, start=1):
        running += loads[holder]
        level = (running + total) / count
        if count == len(order) or level <= loads[order[count]]:
            break
    rows = [0] * len(loads)
    left = num_rows
    for position, holder in enumerate(order[:count]):
        remaining = count - position
        wanted = round((level - loads[holder]) / row_bytes) if row_bytes else left // remaining
        rows[holder] = left if remaining == 1 else min(left, max(0, wanted))
        left -= rows[holder]
    return rows


def assign_writers(
    chunk_bytes: I64, holders: Sequence[Sequence[int]], loads: I64, *, cut_bytes: int
) -> tuple[dict[int, int], list[int]]:
    """Choose a writer for each replicated chunk.

    Args:
        chunk_bytes: ``[n]`` bytes of each chunk.
        holders: Per chunk the ranks that hold it, ascending.
        loads: ``[ranks]`` bytes each rank already writes; updated in place.
        cut_bytes: Chunks of at least this many bytes are left to ``share_rows``.

    Returns:
        Chunk → writer, and the chunks to cut, largest first.
    """
    writers: dict[int, int] = {}
    to_cut: list[int] = []
    for chunk in np.argsort(-chunk_bytes, kind="stable").tolist():
        size = int(chunk_bytes[chunk])
        if size >= cut_bytes and len(holders[chunk]) > 1:
            to_cut.append(chunk)
            continue
        writer = min(holders[chunk], key=lambda rank: (loads[rank], rank))
        loads[writer] += size
        writers[chunk] = writer
    return writers, to_cut
