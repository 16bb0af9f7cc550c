"""Boxes from placements are those that torch itself cuts, even or uneven, strided or not."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_resume.planning.placements import AxisSplit, held_boxes, index_runs

SEEDED = settings(derandomize=True, deadline=None)

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def splits_of(placements, mesh, coordinate, ndim):
    """What the planner makes of a DTensor's placements."""
    splits = [[] for _ in range(ndim)]
    for placement, count, position in zip(placements, mesh, coordinate, strict=True):
        if not isinstance(placement, Replicate):
            factor = getattr(placement, "split_factor", 1)
            splits[placement.dim].append(AxisSplit(count, position, factor))
    return splits


def coordinates(mesh):
    return itertools.product(*(range(count) for count in mesh))


def numbered(shape):
    """A tensor whose elements are their own positions."""
    return torch.arange(math.prod(shape)).reshape(shape)


def pieces(boxes, shape):
    """The elements that held boxes claim, laid out as they say, in a local tensor of their size."""
    whole = numbered(shape)
    sizes = [
        max((b.local_offsets[d] + b.box.sizes[d] for b in boxes), default=0)
        for d in range(len(shape))
    ]
    local = torch.full(sizes, -1)
    for held in boxes:
        source, place = whole, local
        for dim in range(len(shape)):
            source = source.narrow(dim, held.box.offsets[dim], held.box.sizes[dim])
            place = place.narrow(dim, held.local_offsets[dim], held.box.sizes[dim])
        assert (place == -1).all(), "two boxes lie in one place"
        place.copy_(source)
    return local


def cut(tensor, placement, count, position):
    """What torch gives one rank of an axis."""
    shards, _ = placement._split_tensor(tensor, count, with_padding=False, contiguous=True)
    return shards[position]


@st.composite
def plain_layouts(draw):
    shape, mesh = draw(shapes), draw(meshes)
    placement = st.one_of(st.just(Replicate()), st.builds(Shard, st.integers(0, len(shape) - 1)))
    return shape, mesh, [draw(placement) for _ in mesh]


@given(plain_layouts())
@settings(SEEDED)
def test_shards_and_replicas(layout):
    shape, mesh, placements = layout
    for coordinate in coordinates(mesh):
        boxes = held_boxes(shape, splits_of(placements, mesh, coordinate, len(shape)))
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, mesh, list(coordinate), placements
        )
        if math.prod(shape) == 0:
            assert [held.box.sizes for held in boxes] == [shape]
        elif math.prod(sizes) == 0:
            assert boxes == []
        else:
            (held,) = boxes
            assert (held.box.sizes, held.box.offsets) == (sizes, offsets)
            assert held.local_offsets == (0,) * len(shape)


@st.composite
def strided_layouts(draw):
    """Any strided shard that no later shard of the same dim is a partner of."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple))
    mesh = draw(meshes)
    placements = []
    used = set()
    for _ in mesh:
        dim = draw(st.integers(0, len(shape) - 1))
        kind = draw(st.sampled_from(["replicate", "shard", "strided"])) if dim not in used else "r"
        if kind == "shard":
            placements.append(Shard(dim))
        elif kind == "strided":
            placements.append(_StridedShard(dim, split_factor=draw(st.integers(2, 4))))
        else:
            placements.append(Replicate())
            continue
        used.add(dim)
    return shape, mesh, placements


@given(strided_layouts())
@settings(SEEDED)
def test_interleaved_shards(layout):
    shape, mesh, placements = layout
    for coordinate in coordinates(mesh):
        boxes = held_boxes(shape, splits_of(placements, mesh, coordinate, len(shape)))
        expected = numbered(shape)
        for placement, count, position in zip(placements, mesh, coordinate, strict=True):
            if not isinstance(placement, Replicate):
                expected = cut(expected, placement, count, position)
        if expected.numel() == 0:
            assert boxes == []
        else:
            assert torch.equal(pieces(boxes, shape), expected)


@st.composite
def fsdp_over_tp(draw):
    """Shape, sizes of the two axes, and the dim that both of them cut."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple))
    return (
        shape,
        draw(st.integers(1, 4)),
        draw(st.integers(2, 4)),
        draw(st.integers(0, len(shape) - 1)),
    )


@given(fsdp_over_tp())
@settings(SEEDED)
def test_fsdp_over_tensor_parallel_cuts_the_shard_again(layout):
    """``fully_shard`` chunks the local tensor of the tensor-parallel shard, whatever its size."""
    shape, dp, tp, dim = layout
    placements = [_StridedShard(dim, split_factor=tp), Shard(dim)]
    for coordinate in coordinates((dp, tp)):
        boxes = held_boxes(shape, splits_of(placements, (dp, tp), coordinate, len(shape)))
        outer = cut(numbered(shape), Shard(dim), tp, coordinate[1])
        expected = cut(outer, Shard(dim), dp, coordinate[0])
        if expected.numel() == 0:
            assert boxes == []
        else:
            assert torch.equal(pieces(boxes, shape), expected)


@given(
    st.integers(0, 40),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
)
@settings(SEEDED, max_examples=60)
def test_ranks_share_a_dim_without_gap_or_overlap(size, axes):
    counts = [count for count, _ in axes]
    held = []
    for coordinate in coordinates(counts):
        splits = [
            AxisSplit(count, position, factor)
            for (count, factor), position in zip(axes, coordinate, strict=True)
        ]
        runs = index_runs(size, splits)
        assert all(start < stop for start, stop in runs) or size == 0
        held.extend(index for start, stop in runs for index in range(start, stop))
    assert sorted(held) == list(range(size))
