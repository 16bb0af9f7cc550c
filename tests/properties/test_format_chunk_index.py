"""Index round trips, and the tiling check against a painted tensor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.format import tiling
from dcp_resume.format.box_table import decode_boxes, encode_boxes
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.tiling import find_overlaps, tiling_faults

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def pieces(draw, shape):
    """A tiling by random straight cuts, sometimes damaged in one box."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        offsets, sizes = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, sizes[dim]))
        low = tuple(cut if d == dim else s for d, s in enumerate(sizes))
        high = tuple(s - cut if d == dim else s for d, s in enumerate(sizes))
        boxes += [
            (offsets, low),
            (tuple(o + cut * (d == dim) for d, o in enumerate(offsets)), high),
        ]
    damage = draw(st.sampled_from(["none", "drop", "double", "move"]))
    if damage == "drop":
        boxes.pop()
    elif damage == "double":
        boxes.append(boxes[0])
    elif damage == "move":
        number = draw(st.integers(0, len(boxes) - 1))
        sizes = boxes[number][1]
        room = [draw(st.integers(0, n - s)) for n, s in zip(shape, sizes, strict=True)]
        boxes[number] = (tuple(room), sizes)
    return draw(st.permutations(boxes))


tensors = st.lists(shapes.flatmap(lambda s: st.tuples(st.just(s), pieces(s))), max_size=5)


def columns_of(tensors):
    depth = max([1, *(len(shape) for shape, _ in tensors)])
    rows = [(t, o, s) for t, (_, boxes) in enumerate(tensors) for o, s in boxes]
    tensor = np.array([t for t, _, _ in rows], np.int64)
    offsets = np.array([[*o, *[0] * (depth - len(o))] for _, o, _ in rows], np.int64)
    sizes = np.array([[*s, *[1] * (depth - len(s))] for _, _, s in rows], np.int64)
    return tensor, offsets.reshape(-1, depth), sizes.reshape(-1, depth)


def is_tiled(shape, boxes):
    paint = np.zeros(shape, int)
    for offsets, sizes in boxes:
        paint[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] += 1
    return bool((paint == 1).all())


@pytest.mark.parametrize("cycles", [1, 32])
@given(tensors=tensors)
def test_tiling_agrees_with_paint(cycles, tensors):
    tensor, offsets, sizes = columns_of(tensors)
    ndim = np.array([len(shape) for shape, _ in tensors], np.int64)[tensor]
    box_ndim, box_values, box = encode_boxes(ndim, offsets, sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "MAX_CYCLES", cycles)
        faults = tiling_faults(
            tensor, box, *decode_boxes(box_ndim, box_values), [s for s, _ in tensors]
        )
    wrong = {t for t, (shape, boxes) in enumerate(tensors) if not is_tiled(shape, boxes)}
    found = {fault.tensor for fault in faults}
    assert found <= wrong
    assert bool(found) == bool(wrong)


@given(
    st.lists(st.tuples(st.integers(0, 2), *[st.integers(0, 6)] * 2, *[st.integers(1, 4)] * 2)),
    st.sampled_from([1, 2**58]),
    st.sampled_from([1, 7, 2**20]),
)
def test_any_overlap_is_found(rows, scale, batch):
    table = np.array(rows, np.int64).reshape(-1, 5)
    group, begins, stops = table[:, 0], table[:, 1:3], table[:, 1:3] + table[:, 3:]
    overlaps = {
        (min(a, b), max(a, b))
        for a in range(len(rows))
        for b in range(len(rows))
        if a != b and group[a] == group[b]
        and (begins[a] < stops[b]).all() and (begins[b] < stops[a]).all()
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "PAIR_BATCH", batch)
        pairs, unproved = find_overlaps(group, begins * scale, stops * scale)
    assert unproved == []
    assert {(min(pair), max(pair)) for pair in pairs} <= overlaps
    assert bool(pairs) == bool(overlaps)


def test_a_pinwheel_is_proved_and_a_budget_is_kept(monkeypatch):
    wheel = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 3)),
        ((2, 1), (3, 3)),
        ((1, 0), (3, 1)),
        ((1, 1), (2, 2)),
    ]
    begins, stops = (np.array([box[i] for box in wheel]) for i in range(2))
    group = np.zeros(5, np.int64)
    assert find_overlaps(group, begins, stops) == ([], [])
    monkeypatch.setattr(tiling, "PAIR_BUDGET", 1)
    monkeypatch.setattr(tiling, "PAIR_BATCH", 1)
    pairs, unproved = find_overlaps(group, begins, stops)
    assert pairs == []
    assert unproved


@given(tensors, st.integers(0, 40))
def test_index_round_trip(tensors, split):
    tensor, offsets, sizes = columns_of(tensors)
    split = min(split, len(tensor))
    index = ChunkIndex.build(
        [split, 0, len(tensor) - split], tensor, offsets, sizes,
        [len(shape) for shape, _ in tensors], np.zeros((3, 16), np.uint8),
    )  # fmt: skip
    data = index.to_bytes()
    again = ChunkIndex.from_bytes(data, "i")
    assert again.to_bytes() == data
    depth = again.chunk_sizes.shape[1]
    assert np.array_equal(again.chunk_offsets, offsets[:, :depth])
    assert np.array_equal(again.chunk_sizes, sizes[:, :depth])
    assert again.chunk_tensor.tolist() == tensor.tolist()
    for number in range(len(tensors)):
        assert again.chunks_of(number).tolist() == np.flatnonzero(tensor == number).tolist()
    itemsizes = np.arange(len(tensors)) + 1
    length = again.chunk_bytes(itemsizes)
    assert length.tolist() == (sizes.prod(axis=1) * itemsizes[tensor]).tolist()
    begins = again.chunk_begin(itemsizes, [8, 16, 24])
    for file, header in enumerate([8, 16, 24]):
        first, last = again.file_bounds(file)
        expected = header + np.cumsum(length[first:last]) - length[first:last]
        assert begins[first:last].tolist() == expected.tolist()
