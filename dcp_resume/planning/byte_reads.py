"""Overlaps → verified byte ranges of data files, and the copies that each range feeds. Pure.

A range is a whole number of digest blocks, so that it can be proved alone. An overlap that is one
run of bytes in the chunk and in the target is copied as bytes and may be cut anywhere; any other
is cut into groups of whole rows along the chunk's outermost dim whose rows fit a read. A row whose
wanted part is one run on both sides can itself be cut as bytes.

Merge rule: two ranges of one file become one read if the gap between them is at most ``max_gap``
and the read stays within ``max_bytes``; a run of bytes larger than that is cut, and what begins in
the last block of a full read is cut where that read ends, so that its block is not read twice.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dcp_resume.planning.overlaps import Overlap

__all__ = ["BoxCopy", "BytesCopy", "ChunkPlace", "Read", "plan_reads"]


@dataclass(frozen=True, slots=True)
class BytesCopy:
    """Copy one run of bytes."""

    target: int
    source_begin: int
    """Position in the file."""
    target_begin: int
    """Position in the target's row-major bytes."""
    length: int


@dataclass(frozen=True, slots=True)
class BoxCopy:
    """Copy a box out of some whole rows of a chunk."""

    target: int
    source_begin: int
    """Position in the file of the first row."""
    source_sizes: tuple[int, ...]
    """Shape of the rows, elements."""
    source_offsets: tuple[int, ...]
    """Where the box begins in the rows."""
    target_offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    """Shape of the box."""


Copy = BytesCopy | BoxCopy


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a chunk lies."""

    file: int
    begin: int
    """Position in the file, bytes."""
    sizes: tuple[int, ...]
    itemsize: int
    target_sizes: tuple[int, ...]
    """Shape of the target that the overlap goes to."""


@dataclass(frozen=True, slots=True)
class Read:
    """One verified range of one file."""

    file: int
    start: int
    stop: int
    first_block: int
    """Number of the first block within the file."""
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class _Need:
    start: int
    stop: int
    copy: Copy
    place: ChunkPlace
    dim: int = 0
    """Of a box, along which its rows lie."""


def _is_one_run(sizes: Sequence[int], box: Sequence[int]) -> bool:
    """Whether a box of shape ``box`` is contiguous in a row-major array of shape ``sizes``."""
    for dim, (size, extent) in enumerate(zip(sizes, box, strict=True)):
        if extent != 1:
            return tuple(box[dim + 1 :]) == tuple(sizes[dim + 1 :])
        del size
    return True


def _flat(sizes: Sequence[int], offsets: Sequence[int]) -> int:
    """Row-major element number of ``offsets`` in an array of shape ``sizes``."""
    position = 0
    for size, offset in zip(sizes, offsets, strict=True):
        position = position * size + offset
    return position


def _needs(overlap: Overlap, place: ChunkPlace, max_bytes: int) -> list[_Need]:
    box = overlap.in_chunk
    if _is_one_run(place.sizes, box.sizes) and _is_one_run(place.target_sizes, box.sizes):
        return _byte_needs(overlap, place, max_bytes)
    # Rows of the outermost dim whose single row fits a read; dims before it are taken one by one.
    dim = next(d for d, _ in enumerate(box.sizes) if _row_bytes(place, d) <= max_bytes)
    group = max(1, max_bytes // max(_row_bytes(place, dim), 1))
    needs: list[_Need] = []
    outer = itertools.product(*map(range, box.sizes[:dim]))
    for index, row in itertools.product(outer, range(0, box.sizes[dim], group)):
        ahead = (*index, row)
        rows = min(group, box.sizes[dim] - row)
        first = tuple(map(sum, zip(box.offsets, ahead, strict=False)))
        begin = place.begin + _flat(place.sizes[: dim + 1], first) * _row_bytes(place, dim)
        lead = (1,) * dim
        copy = BoxCopy(
            target=overlap.target,
            source_begin=begin,
            source_sizes=(*lead, rows, *place.sizes[dim + 1 :]),
            source_offsets=((0,) * (dim + 1)) + box.offsets[dim + 1 :],
            target_offsets=(
                *map(sum, zip(overlap.in_target.offsets, ahead, strict=False)),
                *overlap.in_target.offsets[dim + 1 :],
            ),
            sizes=(*lead, rows, *box.sizes[dim + 1 :]),
        )
        needs.append(_Need(begin, begin + rows * _row_bytes(place, dim), copy, place, dim))
    return needs


def _row_bytes(place: ChunkPlace, dim: int) -> int:
    """Bytes of what lies behind one index of ``dim``."""
    return math.prod(place.sizes[dim + 1 :]) * place.itemsize


def _byte_needs(overlap: Overlap, place: ChunkPlace, max_bytes: int) -> list[_Need]:
    item = place.itemsize
    source = place.begin + _flat(place.sizes, overlap.in_chunk.offsets) * item
    target = _flat(place.target_sizes, overlap.in_target.offsets) * item
    length = overlap.box.volume * item
    needs: list[_Need] = []
    # Cut at multiples of max_bytes counted from the chunk, where blocks begin too.
    position = source
    while position < source + length:
        limit = place.begin + ((position - place.begin) // max_bytes + 1) * max_bytes
        stop = min(source + length, limit)
        copy = BytesCopy(overlap.target, position, target + position - source, stop - position)
        needs.append(_Need(position, stop, copy, place))
        position = stop
    return needs


def plan_reads(
    overlaps: Sequence[Overlap],
    places: Sequence[ChunkPlace],
    bounds: dict[int, npt.NDArray[np.int64]],
    *,
    max_gap: int,
    max_bytes: int,
) -> list[Read]:
    """Plan the reads of one rank.

    Args:
        overlaps: What to copy.
        places: Per overlap where its chunk lies.
        bounds: Per file the ascending positions of its block starts, and the file size last.
        max_gap: Bytes of a gap that is read rather than split over.
        max_bytes: Bytes of a read, a multiple of the block size.

    Returns:
        Reads in ascending order of file and position; their copies cover every overlap once.
    """
    by_file: dict[int, list[_Need]] = {}
    for overlap, place in zip(overlaps, places, strict=True):
        by_file.setdefault(place.file, []).extend(_needs(overlap, place, max_bytes))
    reads: list[Read] = []
    for file in sorted(by_file):
        needs = by_file[file]
        reads.extend(_merge(file, needs, bounds[file], max_gap=max_gap, max_bytes=max_bytes))
    return reads


def _merge(
    file: int,
    needs: Sequence[_Need],
    bounds: npt.NDArray[np.int64],
    *,
    max_gap: int,
    max_bytes: int,
) -> list[Read]:
    reads: list[Read] = []
    copies: list[Copy] = []
    first = last = -1
    edges: list[int] = bounds.tolist()
    waiting = [(need.start, need.stop, number, need) for number, need in enumerate(needs)]
    heapq.heapify(waiting)  # by position; what is cut off comes back at its own
    numbers = itertools.count(len(waiting))
    while waiting:
        start, stop, _, need = heapq.heappop(waiting)
        low, high = bisect_right(edges, start) - 1, bisect_left(edges, stop)
        if copies:
            is_near = edges[low] - edges[last] <= max_gap
            fits = edges[high] - edges[first] <= max_bytes
            if high <= last or (is_near and fits):
                last = max(last, high)
                copies.append(need.copy)
                continue
            if low < last and _can_be_cut(need):  # else its block is read twice
                head, tail = _cut(need, edges[last])
                copies += head
                for rest in tail:
                    heapq.heappush(waiting, (rest.start, rest.stop, next(numbers), rest))
                continue
            reads.append(_read(file, first, last, copies, bounds))
        first, last, copies = low, high, [need.copy]
    if copies:
        reads.append(_read(file, first, last, copies, bounds))
    return reads


def _read(
    file: int, first: int, last: int, copies: Sequence[Copy], bounds: npt.NDArray[np.int64]
) -> Read:
    return Read(file, int(bounds[first]), int(bounds[last]), first, tuple(copies))


def _can_be_cut(need: _Need) -> bool:
    """Whether each row of a box is one run, wherever it comes from and goes to."""
    behind = slice(need.dim + 1, None)
    return isinstance(need.copy, BytesCopy) or (
        _is_one_run(need.place.sizes[behind], need.copy.sizes[behind])
        and _is_one_run(need.place.target_sizes[behind], need.copy.sizes[behind])
    )


def _cut(need: _Need, at: int) -> tuple[list[Copy], list[_Need]]:
    """The copies before a position in the file, and what is needed behind it."""
    if isinstance(need.copy, BytesCopy):
        return _cut_bytes(need.copy, at, need.place)
    num_rows = need.copy.sizes[need.dim]
    row, is_across = divmod(at - need.start, _row_bytes(need.place, need.dim))
    head: list[Copy] = [_rows(need, 0, row).copy] if row else []
    if not is_across:
        return head, [_rows(need, row, num_rows)]
    before, behind = _cut_bytes(_row_run(_rows(need, row, row + 1)), at, need.place)
    tail = [_rows(need, row + 1, num_rows)] if row + 1 < num_rows else []
    return [*head, *before], [*behind, *tail]


def _cut_bytes(copy: BytesCopy, at: int, place: ChunkPlace) -> tuple[list[Copy], list[_Need]]:
    stop = copy.source_begin + copy.length
    if stop <= at:
        return [copy], []
    if copy.source_begin >= at:
        return [], [_Need(copy.source_begin, stop, copy, place)]
    length = at - copy.source_begin
    tail = BytesCopy(copy.target, at, copy.target_begin + length, copy.length - length)
    return [replace(copy, length=length)], [_Need(at, stop, tail, place)]


def _rows(need: _Need, first: int, stop: int) -> _Need:
    """Some rows of a box."""
    copy, dim, row_bytes = need.copy, need.dim, _row_bytes(need.place, need.dim)
    assert isinstance(copy, BoxCopy)

    def with_rows(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
        return (*sizes[:dim], rows, *sizes[dim + 1 :])

    rows = replace(
        copy,
        source_begin=copy.source_begin + first * row_bytes,
        source_sizes=with_rows(copy.source_sizes, stop - first),
        target_offsets=with_rows(copy.target_offsets, copy.target_offsets[dim] + first),
        sizes=with_rows(copy.sizes, stop - first),
    )
    end = need.start + stop * row_bytes
    return _Need(need.start + first * row_bytes, end, rows, need.place, dim)


def _row_run(need: _Need) -> BytesCopy:
    """One row that is one run, as bytes."""
    row, place = need.copy, need.place
    assert isinstance(row, BoxCopy)
    source = _flat(row.source_sizes, row.source_offsets) * place.itemsize
    target = _flat(place.target_sizes, row.target_offsets) * place.itemsize
    length = math.prod(row.sizes) * place.itemsize
    return BytesCopy(row.target, row.source_begin + source, target, length)
