"""The table of distinct boxes of an index: per box its dimensions, its offsets and its sizes.

On thousands of ranks the same few boxes recur for every tensor, so chunks name boxes by number.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_DIMS",
    "box_table_fault",
    "decode_boxes",
    "distinct_rows",
    "encode_boxes",
    "shape_fault",
]

Int64s: TypeAlias = npt.NDArray[np.int64]

MAX_DIMS = 32
"""Most dimensions of a tensor; bounds what a small hostile index can make a reader allocate."""
MAX_TOTAL_BYTES = 2**62
"""Most bytes of a checkpoint and of a tensor: sums of sizes below it cannot overflow."""


def encode_boxes(
    ndim: Int64s, offsets: Int64s, sizes: Int64s
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """Number the distinct boxes of chunks, in ascending order of (ndim, offsets, sizes).

    Args:
        ndim: int64[C], dimensions of each chunk.
        offsets: int64[C, D], padded with 0.
        sizes: int64[C, D], padded with 1.

    Returns:
        Columns ``box_ndim`` (u8[B]), ``box_values`` (u64) and ``chunk_box`` (u32[C]).
    """
    rows = np.column_stack([ndim, offsets, sizes]).astype(np.int64, copy=False)
    table, code = distinct_rows(rows)
    is_used = np.arange(offsets.shape[1]) < table[:, :1]
    values = table[:, 1:][np.hstack([is_used, is_used])]
    return table[:, 0].astype(np.uint8), values.astype(np.uint64), code.astype(np.uint32)


def decode_boxes(
    box_ndim: npt.NDArray[np.uint8], box_values: npt.NDArray[np.uint64]
) -> tuple[Int64s, Int64s]:
    """Offsets (int64[B, D], padded with 0) and sizes (padded with 1) of a faultless table."""
    depth = int(box_ndim.max(initial=0))
    is_used = np.arange(depth) < box_ndim[:, None]
    both = np.zeros((len(box_ndim), 2 * depth), np.int64)
    both[:, depth:] = 1
    both[np.hstack([is_used, is_used])] = box_values
    return both[:, :depth], both[:, depth:]


def box_table_fault(
    box_ndim: npt.NDArray[np.uint8], box_values: npt.NDArray[np.uint64]
) -> str | None:
    """What contradicts itself in the two columns as read, or None."""
    num_values = 2 * int(box_ndim.sum(dtype=np.uint64))
    if num_values != len(box_values):
        return f"boxes need {num_values} values, {len(box_values)} are listed"
    if int(box_ndim.max(initial=0)) > MAX_DIMS:
        return f"a box has {box_ndim.max()} dimensions, at most {MAX_DIMS} are read"
    if np.count_nonzero(box_ndim == 0) > 1:
        # It costs one byte in the file and a row of MAX_DIMS in memory.
        return "the box of no dimensions is listed more than once"
    if int(box_values.max(initial=0)) >= 2**63:
        return "an offset or size of a box is beyond 2^63 - 1"
    return None


def shape_fault(shape: tuple[int, ...], itemsize: int | None) -> str | None:
    """Why a tensor of this shape and element (bytes; None for an unknown dtype) is not read."""
    if itemsize is None:
        return "its dtype is not known"
    if len(shape) > MAX_DIMS:
        return f"{len(shape)} dimensions, at most {MAX_DIMS} are read"
    if math.prod(shape) * itemsize > MAX_TOTAL_BYTES:
        return f"shape {shape} has more than {MAX_TOTAL_BYTES} bytes"
    return None


def distinct_rows(rows: Int64s) -> tuple[Int64s, Int64s]:
    """Sorted distinct rows of a matrix, and the number of each row among them."""
    # One sort of hashes instead of one sort of rows per column; a collision is noticed.
    mixed = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    _, first, code = np.unique(mixed, return_index=True, return_inverse=True)
    table = rows[first]
    if not np.array_equal(table[code], rows):
        table, code = np.unique(rows, axis=0, return_inverse=True)
        return table, code.reshape(-1)
    order = np.lexsort(table.T[::-1])
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return table[order], rank[code]
