"""Overlaps and reads carry every wanted byte once, in whole blocks, within limits."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.digests import BlockRule
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.box_rows import pad_boxes
from dcp_resume.planning.byte_reads import BytesCopy, ChunkPlace, plan_reads
from dcp_resume.planning.overlaps import Wanted, find_overlaps

SEEDED = settings(derandomize=True, deadline=None)

HEADER = 24


def region(box):
    return tuple(slice(a, b) for a, b in zip(box.offsets, box.stops, strict=True))


@dataclass
class Stored:
    """Tensors cut into chunks, in files in memory."""

    tensors: list[np.ndarray]
    """Each of shape ``[*shape, itemsize]``, random bytes."""
    chunks: list[tuple[int, Box]]
    """Tensor and box, in file order."""
    files: list[bytes]
    index: ChunkIndex
    block_size: int


def cuts_of(draw, size):
    """One dim cut into runs, some of a single element."""
    stops = sorted(draw(st.sets(st.integers(1, size), max_size=3)) | {size})
    return list(itertools.pairwise([0, *stops]))


def grid(draw, shape):
    """A tensor cut along straight lines into boxes."""
    runs = [cuts_of(draw, size) for size in shape]
    return [
        Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell))
        for cell in itertools.product(*runs)
    ]


@st.composite
def stored_tensors(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors, chunks = [], []
    for tensor in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 6), max_size=3))
        itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
        tensors.append(random.integers(0, 256, (*shape, itemsize), np.uint8))
        chunks += [(tensor, box) for box in grid(draw, shape)]
    chunks = draw(st.permutations(chunks))
    block_size = draw(st.sampled_from([16, 64, 4096]))  # an element is never cut
    counts = [len(part) for part in np.array_split(np.arange(len(chunks)), draw(st.integers(1, 3)))]
    offsets, sizes = pad_boxes([box for _, box in chunks], 3)
    index = ChunkIndex.build(
        file_chunk_count=counts,
        chunk_tensor=[tensor for tensor, _ in chunks],
        offsets=offsets,
        sizes=sizes,
        ndims=[data.ndim - 1 for data in tensors],
        block_digest=np.zeros((0, 16), np.uint8),
    )
    ends = np.cumsum([0, *counts])
    files = [
        bytes(HEADER) + b"".join(tensors[t][region(box)].tobytes() for t, box in chunks[a:b])
        for a, b in itertools.pairwise(ends)
    ]
    return Stored(tensors, chunks, files, index, block_size)


@st.composite
def wanted_boxes(draw, stored):
    """Boxes of the tensors, as other layouts would want them; they may overlap."""
    wanted = []
    for tensor, data in enumerate(stored.tensors):
        boxes = grid(draw, data.shape[:-1])
        wanted += [(tensor, box) for box in boxes if draw(st.booleans())]
    return [Wanted(number, tensor, box) for number, (tensor, box) in enumerate(wanted)]


@st.composite
def loads(draw):
    stored = draw(stored_tensors())
    return (
        stored,
        draw(wanted_boxes(stored)),
        draw(st.sampled_from([0, 8, 1024])),
        stored.block_size * draw(st.sampled_from([1, 2, 8])),
    )


def plan(stored, wanted, max_gap, max_bytes):
    itemsizes = [data.shape[-1] for data in stored.tensors]
    headers = [HEADER] * len(stored.files)
    overlaps = find_overlaps(wanted, stored.index)
    begins = stored.index.chunk_begin(itemsizes, headers)
    places = [
        ChunkPlace(
            int(stored.index.chunk_file[o.chunk]),
            int(begins[o.chunk]),
            stored.chunks[o.chunk][1].sizes,
            itemsizes[stored.chunks[o.chunk][0]],
            wanted[o.target].box.sizes,
        )
        for o in overlaps
    ]
    counts = stored.index.file_chunk_count.astype(np.int64)
    blocks = BlockRule(stored.block_size).cut(
        np.array(headers), counts, stored.index.chunk_bytes(itemsizes)
    )
    bounds = {file: blocks.bounds(file) for file in range(len(stored.files))}
    reads = plan_reads(overlaps, places, bounds, max_gap=max_gap, max_bytes=max_bytes)
    return overlaps, reads, bounds


def copy_out(copy, buffer, start, target, counted):
    """Do one copy; ``counted`` says how often each byte of the target was written."""
    begin = copy.source_begin - start
    if isinstance(copy, BytesCopy):
        place = slice(copy.target_begin, copy.target_begin + copy.length)
        assert begin >= 0
        assert begin + copy.length <= len(buffer)
        target.reshape(-1)[place] = buffer[begin : begin + copy.length]
        counted.reshape(-1)[place] += 1
        return
    item = target.shape[-1]
    rows = buffer[begin : begin + math.prod(copy.source_sizes) * item]
    box = region(Box(copy.target_offsets, copy.sizes))
    inner = region(Box(copy.source_offsets, copy.sizes))
    target[box] = rows.reshape((*copy.source_sizes, item))[inner]
    counted[box] += 1


@given(loads())
@settings(SEEDED, max_examples=150)
def test_every_wanted_byte_is_copied_once(load):
    stored, wanted, max_gap, max_bytes = load
    _, reads, bounds = plan(stored, wanted, max_gap, max_bytes)
    shapes = [(*want.box.sizes, stored.tensors[want.tensor].shape[-1]) for want in wanted]
    targets = [np.zeros(shape, np.uint8) for shape in shapes]
    counted = [np.zeros(shape, int) for shape in shapes]

    for read in reads:
        own = bounds[read.file]
        assert own[read.first_block] == read.start
        assert read.stop in own
        buffer = np.frombuffer(stored.files[read.file][read.start : read.stop], np.uint8)
        assert len(buffer) == read.stop - read.start > 0
        for copy in read.copies:
            copy_out(copy, buffer, read.start, targets[copy.target], counted[copy.target])

    for want, target, count in zip(wanted, targets, counted, strict=True):
        assert np.array_equal(target, stored.tensors[want.tensor][region(want.box)])
        assert (count == 1).all()


@given(loads())
@settings(SEEDED, max_examples=100)
def test_reads_stay_within_their_limits(load):
    stored, wanted, max_gap, max_bytes = load
    _, reads, _ = plan(stored, wanted, max_gap, max_bytes)

    for read in reads:
        # The ends are widened to blocks.
        assert read.stop - read.start <= max_bytes + 2 * stored.block_size
    order = [(read.file, read.start) for read in reads]
    assert order == sorted(order)


@given(stored_tensors())
@settings(SEEDED, max_examples=50)
def test_loading_everything_reads_every_file_about_once(stored):
    """The same layout on both sides costs no byte twice when blocks and reads are large."""
    wanted = [Wanted(n, tensor, box) for n, (tensor, box) in enumerate(stored.chunks)]
    overlaps, reads, _ = plan(stored, wanted, 1024, 1 << 20)

    assert sorted(overlap.chunk for overlap in overlaps) == list(range(len(stored.chunks)))
    for file, data in enumerate(stored.files):
        own = [read for read in reads if read.file == file]
        assert sum(read.stop - read.start for read in own) <= len(data)
        assert len(own) <= 1


@given(stored_tensors())
@settings(SEEDED, max_examples=50)
def test_overlaps_tile_what_is_wanted(stored):
    for tensor, data in enumerate(stored.tensors):
        whole = Box.whole(data.shape[:-1])
        painted = np.zeros(data.shape[:-1], int)
        for overlap in find_overlaps([Wanted(0, tensor, whole)], stored.index):
            painted[region(overlap.box)] += 1
        assert (painted == 1).all()


@given(loads())
@settings(SEEDED, max_examples=150)
def test_no_block_is_read_twice_where_rows_are_runs_of_bytes(drawn):
    _, wanted, *_ = drawn
    _, reads, bounds = plan(*drawn)
    if any(len(want.box.sizes) > 2 for want in wanted):
        return
    for file, file_bounds in bounds.items():
        own = sorted((read.start, read.stop) for read in reads if read.file == file)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(own))
        assert {edge for read in own for edge in read} <= set(file_bounds.tolist())
