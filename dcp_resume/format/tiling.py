"""Whether boxes tile their tensors, for millions of boxes of thousands of tensors at once.

Boxes inside a tensor tile it if they hold as many elements as it has and no two overlap. For the
second, boxes are separated along one dimension after the other: sorted by where they begin, a box
that begins behind the reach of all before it opens a new group, and a box alone in its group
overlaps nothing. Every layout that straight cuts can make (all grids, even or uneven) falls apart
in a few passes. What remains interlocks, like the boards of a pinwheel, or does overlap: those few
are compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["TilingFault", "find_overlaps", "tiling_faults"]

Int64s: TypeAlias = npt.NDArray[np.int64]

MAX_CYCLES = 32
"""Passes over all dimensions; a hostile staircase would otherwise take as many as it has boxes."""
PAIR_BATCH = 2**20
PAIR_BUDGET = 2**27
"""Pairs that are compared before the answer is "too irregular to prove": some ten seconds."""


@dataclass(frozen=True, slots=True)
class TilingFault:
    """Why the chunks of one tensor do not tile it."""

    tensor: int
    kind: str
    """``hole``, ``overlap`` or ``irregular``."""
    chunks: tuple[int, ...]
    """The chunks at fault, where single ones are."""
    message: str


def tiling_faults(
    tensor: Int64s,
    box: npt.NDArray[Any],
    box_offsets: Int64s,
    box_sizes: Int64s,
    shapes: Sequence[tuple[int, ...] | None],
) -> list[TilingFault]:
    """Find the tensors that their chunks do not tile exactly.

    Args:
        tensor: int64[C], tensor of each chunk.
        box: int[C], box of each chunk, inside its tensor and of as many dimensions.
        box_offsets: int64[B, D], padded with 0.
        box_sizes: int64[B, D], padded with 1.
        shapes: Global shape of each tensor; None for one that has no chunks.
    """
    volume = np.prod(box_sizes, axis=1, dtype=np.int64)[box]
    expected = np.array([0 if shape is None else math.prod(shape) for shape in shapes], np.int64)
    held = np.zeros(len(shapes), np.int64)
    np.add.at(held, tensor, volume)
    is_wrong = held != expected
    faults = [
        TilingFault(
            t,
            "hole" if held[t] < expected[t] else "overlap",
            (),
            f"its chunks hold {held[t]} elements, the tensor has {expected[t]}",
        )
        for t in np.flatnonzero(is_wrong).tolist()
    ]
    ndim = np.array([len(shape or ()) for shape in shapes], np.int64)
    is_open = (volume > 0) & ~is_wrong[tensor]
    for depth in np.unique(ndim[ndim > 0]).tolist():
        chunks = np.flatnonzero(is_open & (ndim[tensor] == depth))
        begins = box_offsets[box[chunks], :depth]
        pairs, unproved = find_overlaps(
            tensor[chunks], begins, begins + box_sizes[box[chunks], :depth]
        )
        for a, b in pairs:
            both = int(chunks[a]), int(chunks[b])
            faults.append(TilingFault(int(tensor[both[0]]), "overlap", both, "overlap"))
        for t in np.unique(tensor[chunks[unproved]]).tolist():
            message = "its boxes are too irregular to be proved disjoint"
            faults.append(TilingFault(t, "irregular", (), message))
    return faults


def find_overlaps(
    group: Int64s, begins: Int64s, stops: Int64s
) -> tuple[list[tuple[int, int]], list[int]]:
    """Find boxes that overlap another box of their group.

    Args:
        group: int64[n], ids from 0; only boxes of one group are compared.
        begins: int64[n, D], first index per dimension.
        stops: int64[n, D], first index behind; greater than ``begins`` (no box is empty).

    Returns:
        Pairs of positions that overlap (of some groups one each, and at least one if there is
        any), and positions of boxes too irregular to be proved disjoint within bounded time (none
        in practice).
    """
    rows = np.arange(len(group))
    for _ in range(MAX_CYCLES):
        before = len(rows), int(group.max(initial=0))
        for dim in range(begins.shape[1]):
            rows, group = _separate(rows, group, begins[rows, dim], stops[rows, dim])
        if not len(rows):
            return [], []
        if before == (len(rows), int(group.max(initial=0))):
            break
    return _compare_pairs(rows, group, begins[rows], stops[rows])


def _keys(group: Int64s, begin: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
    """Order-preserving numbers for (group, begin) and (group, stop), comparable with each other."""
    span = int(stop.max(initial=0)) + 1
    if span > 2**62 // (int(group.max(initial=0)) + 1):
        # Coordinates this wide overflow below; their ranks do not.
        _, ranks = np.unique(np.concatenate([begin, stop]), return_inverse=True)
        begin, stop = ranks[: len(begin)], ranks[len(begin) :]
        span = int(ranks.max()) + 1
    return group * span + begin, group * span + stop


def _separate(rows: Int64s, group: Int64s, begin: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
    """Split groups where no box spans; drop boxes left alone; number groups from 0 again."""
    if not len(rows):
        return rows, group
    begin, stop = _keys(group, begin, stop)
    order = np.argsort(begin)
    begin, reach = begin[order], np.maximum.accumulate(stop[order])
    # Keys of a later group exceed every reach of an earlier one, so groups never merge.
    opens = np.append(True, begin[1:] >= reach[:-1])
    group = np.cumsum(opens) - 1
    crowded = np.bincount(group) > 1
    keep = crowded[group]
    return rows[order][keep], (np.cumsum(crowded) - 1)[group[keep]]


def _compare_pairs(
    rows: Int64s, group: Int64s, begins: Int64s, stops: Int64s
) -> tuple[list[tuple[int, int]], list[int]]:
    """Compare all pairs that overlap along the dimension where fewest do."""
    candidates = [_sweep(group, begins[:, d], stops[:, d]) for d in range(begins.shape[1])]
    order, partners = min(candidates, key=lambda found: float(found[1].sum(dtype=np.float64)))
    begins, stops, rows = begins[order], stops[order], rows[order]
    done = np.cumsum(partners, dtype=np.float64)
    position = 0
    while position < len(rows):
        spent = done[position - 1] if position else 0.0
        if spent > PAIR_BUDGET:
            return [], rows[position:].tolist()
        last = max(position + 1, int(np.searchsorted(done, spent + PAIR_BATCH, "right")))
        count = partners[position:last]
        left = np.repeat(np.arange(position, last), count)
        right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
        meets = (begins[left] < stops[right]) & (begins[right] < stops[left])
        hits = np.flatnonzero(meets.all(axis=1))
        if len(hits):
            _, first = np.unique(group[order[left[hits]]], return_index=True)
            a, b = rows[left[hits[first]]], rows[right[hits[first]]]
            return list(zip(a.tolist(), b.tolist(), strict=True)), []
        position = last
    return [], []


def _sweep(group: Int64s, begin: Int64s, stop: Int64s) -> tuple[Int64s, Int64s]:
    """Order by begin, and how many boxes behind each begin before it stops."""
    begin, stop = _keys(group, begin, stop)
    order = np.argsort(begin)
    begin, stop = begin[order], stop[order]
    # Behind its last key a group has none of its own: stop < span keeps the search inside.
    return order, np.searchsorted(begin, stop, "left") - np.arange(len(begin)) - 1
