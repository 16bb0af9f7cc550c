"""Declared layouts against numpy: a rank's memory is the box of the whole that it is said to be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.declared import Flat, Member, Segment, Split
from dcp_resume.planning.flat import range_boxes
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.padding import inside_of, outside_of
from dcp_resume.planning.state import describe_state

SEEDED = settings(derandomize=True, deadline=None, max_examples=60)
SIZES = st.sampled_from([1, 2, 3, 4])


def numbered(shape):
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def region(box):
    return tuple(slice(a, b) for a, b in zip(box.offsets, box.stops, strict=True))


def states_of(mesh, layouts, make):
    """Every rank's described state, and the declarations that it was described by."""
    for rank in range(math.prod(mesh.values())):
        place = MeshPlace.numbered(mesh, rank)
        declared = Declarations(mesh=place, layouts=layouts)
        yield describe_state(make(place), declared), declared


def check(mesh, layouts, make, wholes):
    """Pieces are where they are said to be, cover everything, and make a plan that tiles."""
    plans, covered = [], {fqn: np.zeros(tuple(t.shape), int) for fqn, t in wholes.items()}
    world_size = math.prod(mesh.values())
    for rank, (state, declared) in enumerate(states_of(mesh, layouts, make)):
        for held in state.tensors:
            whole = wholes[held.entry.fqn]
            assert held.entry.global_shape == tuple(whole.shape)
            for piece in held.pieces:
                assert torch.equal(piece.memory, whole[region(piece.box)])
                covered[held.entry.fqn][region(piece.box)] += 1
        plans.append(local_plan(state, rank, world_size, declared))
    assert all((count > 0).all() for count in covered.values())
    merged = merge(plans)
    chunks = merged.layout.chunks
    written = np.bincount(chunks.tensor, chunks.sizes.prod(axis=1), len(merged.tensors))
    volumes = {entry.fqn: int(n) for entry, n in zip(merged.tensors, written, strict=True)}
    assert volumes == {fqn: whole.numel() for fqn, whole in wholes.items()}


@given(SIZES, SIZES, st.permutations(["a", "b"]), st.integers(1, 3), st.integers(0, 1))
@SEEDED
def test_even_splits_over_two_axes(a, b, order, width, other):
    mesh = {"a": a, "b": b}
    dims = {order[0]: 0, order[1]: other}
    counts = [1, 1]
    for axis, dim in dims.items():
        counts[dim] *= mesh[axis]
    whole = numbered((counts[0] * width, counts[1] * 2, 3))

    def make(place):
        local = whole
        for axis, dim in dims.items():
            split = place.split(axis)
            local = local.chunk(split.count, dim)[split.coordinate]
        return {"model": {"w": local.clone()}}

    check(mesh, {"*w": Split(dims)}, make, {"model.w": whole})


@st.composite
def segmented(draw):
    """Ranks of tp and dp, and segments that they can share."""
    tp, dp = draw(SIZES), draw(st.sampled_from([1, 2]))
    segments = []
    for number in range(draw(st.integers(1, 4))):
        divisors = [n for n in range(1, tp + 1) if tp % n == 0]
        units = draw(st.sampled_from([*divisors, tp * draw(st.integers(1, 3))]))
        rows = draw(st.integers(1, 3))
        segments.append(Segment(f"s{number}", units * rows, units=units))
    return tp, dp, tuple(segments), draw(st.integers(0, 1))


@given(segmented())
@SEEDED
def test_segments_are_split_each_by_itself(world):
    tp, dp, segments, dim = world
    size = sum(segment.size for segment in segments)
    whole = numbered((size, 3) if dim == 0 else (3, size))

    def make(place):
        at = place.split("tp").coordinate
        runs = whole.split([segment.size for segment in segments], dim)
        own = [
            run.chunk(min(s.units, tp), dim)[at * min(s.units, tp) // tp]
            for s, run in zip(segments, runs, strict=True)
        ]
        return {"model": {"qkv": torch.cat(own, dim)}}

    layouts = {"*": Split({"tp": dim}, segments)}
    check({"dp": dp, "tp": tp}, layouts, make, {"model.qkv": whole})


@st.composite
def flat_worlds(draw):
    tp, dp = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3, 5]))
    members = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
        dim = draw(st.integers(0, len(shape) - 1))
        members.append(
            (f"w{number}", shape, draw(st.sampled_from(["whole", "split", "packed"])), dim)
        )
    return tp, dp, members, draw(st.integers(0, 9))


def segments_of(size):
    return (Segment("a", 2 * size), Segment("b", 2))


@given(flat_worlds())
@SEEDED
def test_flat_buffers_are_boxes_of_their_members(world):
    tp, dp, members, padding = world
    layouts, wholes = {}, {}
    for name, shape, kind, dim in members:
        full = list(shape)
        if kind == "split":
            full[dim] *= tp
            layouts[f"*.{name}.*"] = Split({"tp": dim})
        elif kind == "packed":
            full[dim] = 2 * shape[dim] + 2
            layouts[f"*.{name}.*"] = Split({"tp": dim}, segments_of(shape[dim]))
        else:
            layouts[f"*.{name}.*"] = Split({})
        wholes[name] = numbered(full)

    def local(name, kind, dim, place):
        split = place.split("tp")
        if kind == "split":
            return wholes[name].chunk(tp, dim)[split.coordinate]
        if kind == "packed":
            size = wholes[name].shape[dim] - 2
            runs = wholes[name].split([size, 2], dim)
            return torch.cat([run.chunk(tp, dim)[split.coordinate] for run in runs], dim)
        return wholes[name]

    first = MeshPlace.numbered({"dp": dp, "tp": tp}, 0)
    shapes = {name: tuple(local(name, kind, dim, first).shape) for name, _, kind, dim in members}
    flat = Flat(
        tuple(Member(name, shape) for name, shape in shapes.items()),
        ("dp",),
        "optim.state.{}.exp_avg",
    )
    total = sum(map(math.prod, shapes.values()))
    length = -(-(total + padding) // dp)

    def make(place):
        parts = [local(name, kind, dim, place).reshape(-1) for name, _, kind, dim in members]
        joined = torch.cat([*parts, torch.full((length * dp - total,), -1.0, dtype=torch.float64)])
        return {"zero": {"buffer": joined.chunk(dp)[place.split("dp").coordinate].clone()}}

    expected = {flat.fqn(Member(name, ())): whole for name, whole in wholes.items()}
    check({"dp": dp, "tp": tp}, {"zero.buffer": flat, **layouts}, make, expected)


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
@SEEDED
def test_a_range_is_at_most_2n_minus_1_boxes_in_its_order(shape, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    numbers = np.arange(total).reshape(shape)

    boxes = list(range_boxes(shape, start, stop))

    found = [number for box in boxes for number in numbers[region(box)].reshape(-1).tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=3
    )
)
@SEEDED
def test_a_box_is_what_lies_inside_a_shape_and_what_lies_outside(dims):
    box = Box(tuple(o for o, _, _ in dims), tuple(s for _, s, _ in dims))
    shape = tuple(n for _, _, n in dims)
    painted = np.zeros([11] * len(dims), int)
    inside = inside_of(box, shape)
    if inside is not None:
        painted[region(inside)] += 1
        assert all(stop <= size for stop, size in zip(inside.stops, shape, strict=True))
    for other in outside_of(box, shape):
        painted[region(other)] += 1
        assert any(start >= size for start, size in zip(other.offsets, shape, strict=True))
    assert painted.sum() == box.volume
    assert (painted[region(box)] == 1).all()


@pytest.mark.parametrize("rank", range(24))
def test_numbered_ranks_are_told_apart(rank):
    place = MeshPlace.numbered({"pp": 2, "dp": 3, "tp": 4}, rank)
    assert place.rank == rank
    assert place.first_rank == rank // 12 * 12
    assert place.coordinate == (rank % 12 // 4, rank % 4)
    position = list(itertools.product(range(3), range(4))).index(place.coordinate)
    assert place.entry().ranks is None if rank < 12 else position + 12 == rank
