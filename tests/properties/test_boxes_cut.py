"""Boxes that are cut by others: no element is lost, and none is in two pieces."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.cells import disjoint_cells

SEEDED = settings(derandomize=True, deadline=None, max_examples=100)

EXTENT = 9


@st.composite
def box_lists(draw):
    ndim = draw(st.integers(0, 3))
    pairs = st.tuples(st.integers(0, 5), st.integers(0, 4))
    dims = st.lists(pairs, min_size=ndim, max_size=ndim)
    rows = draw(st.lists(dims, min_size=2, max_size=5))
    return [Box(tuple(o for o, _ in row), tuple(s for _, s in row)) for row in rows]


def painted(boxes):
    ndim = len(boxes[0].sizes)
    canvas = np.zeros((EXTENT,) * ndim, int)
    for box in boxes:
        canvas[tuple(slice(a, b) for a, b in zip(box.offsets, box.stops, strict=True))] += 1
    return canvas


@given(box_lists())
@SEEDED
def test_what_is_outside_of_a_hole_and_what_is_inside_make_the_box(boxes):
    box, hole = boxes[:2]
    rest = list(box.without(hole))
    common = box.intersect(hole)
    inside = [common] if common is not None else []
    empty = Box((0,) * len(box.sizes), (0,) * len(box.sizes))
    if box.volume:
        assert np.array_equal(painted([*rest, *inside]), painted([box]))
    else:
        assert rest == []
    if box.sizes:  # of no dims, the empty box has an element
        assert not (painted([*rest, empty]) * painted([hole])).any()


@given(box_lists())
@SEEDED
def test_cells_are_disjoint_and_each_box_is_a_union_of_them(boxes):
    boxes = list(dict.fromkeys(box for box in boxes if box.volume))
    assume(boxes)
    cells = disjoint_cells(boxes)
    canvas = painted(cells)
    assert canvas.max() <= 1
    assert np.array_equal(canvas > 0, painted(boxes) > 0)
    for box in boxes:
        assert sum(cell.volume for cell in cells if box.contains(cell)) == box.volume
