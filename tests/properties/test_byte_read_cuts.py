"""Reads cut anywhere still carry every element of an overlap to its place."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.byte_reads import BytesCopy, ChunkPlace, plan_reads
from dcp_resume.planning.overlaps import Overlap

BLOCK = 8


@st.composite
def placed_boxes(draw):
    """Shape of a chunk, a box in it, shape of a target, and where the box lies in it."""
    dims = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        offset = draw(st.integers(0, size - 1))
        extent = draw(st.integers(1, size - offset))
        target = extent + draw(st.integers(0, 2))
        dims.append((size, offset, extent, target, draw(st.integers(0, target - extent))))
    return tuple(zip(*dims, strict=True))


def region(offsets, sizes):
    return tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))


@given(
    placed_boxes(),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([BLOCK, 2 * BLOCK, 4 * BLOCK]),
    st.sampled_from([0, 16]),
)
def test_copies_fill_the_target(shape, itemsize, max_bytes, max_gap):
    sizes, offsets, extents, target_sizes, target_offsets = shape
    data = np.arange(math.prod(sizes) * itemsize, dtype=np.uint8)
    file = np.concatenate([np.zeros(64, np.uint8), data])
    bounds = np.append(np.arange(64, len(file), BLOCK), len(file))
    overlap = Overlap(
        0, 0, Box(offsets, extents), Box(offsets, extents), Box(target_offsets, extents)
    )
    place = ChunkPlace(0, 64, sizes, itemsize, target_sizes)
    reads = plan_reads([overlap], [place], {0: bounds}, max_gap=max_gap, max_bytes=max_bytes)

    wanted = np.zeros((*target_sizes, itemsize), np.uint8)
    wanted[region(target_offsets, extents)] = data.reshape((*sizes, itemsize))[
        region(offsets, extents)
    ]
    found = np.zeros(wanted.size, np.uint8)
    for read in reads:
        # Widened by at most a block at either end.
        assert read.stop - read.start <= max_bytes + 2 * BLOCK
        for copy in read.copies:
            if isinstance(copy, BytesCopy):
                source = file[copy.source_begin : copy.source_begin + copy.length]
                assert read.start <= copy.source_begin <= read.stop - copy.length
                found[copy.target_begin : copy.target_begin + copy.length] = source
                continue
            length = math.prod(copy.source_sizes) * itemsize
            assert read.start <= copy.source_begin <= read.stop - length
            rows = file[copy.source_begin : copy.source_begin + length]
            rows = rows.reshape((*copy.source_sizes, itemsize))
            into = found.reshape(wanted.shape)[region(copy.target_offsets, copy.sizes)]
            into[...] = rows[region(copy.source_offsets, copy.sizes)]
    assert np.array_equal(found.reshape(wanted.shape), wanted)
