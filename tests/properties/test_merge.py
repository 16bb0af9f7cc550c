"""Merged plans: one holder writes each byte, tensors are tiled, bytes are level."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_resume.errors import IncompletePlan, ReplicaMismatch
from dcp_resume.format.leaves import pack_leaves
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning import merged_shapes as merging
from dcp_resume.planning.balance import assign_writers, share_rows
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.merge import merge
from dcp_resume.planning.plans import (
    LocalPlan,
    PlanContents,
    PlanShape,
    RankPlan,
    decode_structure,
    encode_structure,
)

SEEDED = settings(derandomize=True, deadline=None)

NO_VALUES = pack_leaves({})


def entry(name, shape, dtype="float32"):
    path = ("model", name)
    return TensorEntry(
        fqn=".".join(path),
        path=path,
        part="model",
        dtype=dtype,
        global_shape=shape,
        kind="sharded",
    )


def local_plan(rank, entries, chunks, digests=None):
    """A rank's plan; ``chunks`` are pairs of a position in ``entries`` and a box."""
    boxes, box = Boxes.listing([box for _, box in chunks], 3)
    shape = PlanShape(
        rank=rank,
        world_size=0,
        structure=encode_structure(entries, []),
        tensor=np.array([tensor for tensor, _ in chunks], np.int32),
        box=box,
        boxes=boxes,
        compared=np.arange(0 if digests is None else len(chunks), dtype=np.int32),
    )
    return LocalPlan(shape, PlanContents(b"" if digests is None else digests.tobytes(), NO_VALUES))


def grid(draw, shape):
    runs = []
    for size in shape:
        stops = sorted(draw(st.sets(st.integers(1, size), max_size=2)) | {size})
        runs.append(list(itertools.pairwise([0, *stops])))
    return [
        Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell))
        for cell in itertools.product(*runs)
    ]


@st.composite
def worlds(draw):
    """Ranks, tensors with their boxes, and who holds each box."""
    num_ranks = draw(st.integers(1, 5))
    ranks = st.integers(0, num_ranks - 1)
    tensors = []
    for number in range(draw(st.integers(1, 5))):
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        boxes = {box: draw(st.sets(ranks, min_size=1)) for box in grid(draw, shape)}
        dtype = draw(st.sampled_from(["float32", "bfloat16", "int64", "bool", "complex64"]))
        tensors.append((entry(f"t{number}", shape, dtype), boxes))
    return num_ranks, tensors


def plans_of(num_ranks, tensors):
    """One plan a rank; a rank names only the tensors that it holds something of."""
    plans = []
    for rank in range(num_ranks):
        own = [(e, [b for b, holders in boxes.items() if rank in holders]) for e, boxes in tensors]
        own = [(e, boxes) for e, boxes in own if boxes]
        chunks = [(position, box) for position, (_, boxes) in enumerate(own) for box in boxes]
        plans.append(local_plan(rank, [e for e, _ in own], chunks))
    return plans


@given(worlds(), st.sampled_from([1, 32, 1 << 30]))
@settings(SEEDED, max_examples=150)
def test_one_holder_writes_each_element(world, cut_bytes):
    num_ranks, tensors = world
    plans = plans_of(num_ranks, tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "CUT_BYTES", cut_bytes)  # tensors of a test are small
        merged = merge([LocalPlan.from_bytes(plan.to_bytes()) for plan in plans])

    names = {e.fqn: (e, boxes) for e, boxes in tensors}
    painted = {fqn: np.zeros(e.global_shape, int) for fqn, (e, _) in names.items()}
    keys = set()
    for rank, plan in enumerate(plans):
        part = RankPlan.from_bytes(merged.rank_plan(rank).to_bytes())
        entries = [names[f] for f in _fqns(plan)]
        named = [key for _, _, key, _, _ in part.rows(_fqns(plan))]
        files = [part.files[file].name for file in part.file.tolist()]
        file_keys = list(zip(files, named, strict=True))
        keys.update(file_keys)
        for row, local in enumerate(part.tensor.tolist()):
            e, boxes = entries[local]
            ndim = len(e.global_shape)
            box = Box(
                tuple(part.offsets[row, :ndim].tolist()), tuple(part.sizes[row, :ndim].tolist())
            )
            assert any(rank in holders and held.contains(box) for held, holders in boxes.items())
            region = tuple(slice(a, b) for a, b in zip(box.offsets, box.stops, strict=True))
            painted[e.fqn][region] += 1
            key = file_keys[row][1]
            assert key == e.fqn or key.startswith(e.fqn + "#")
    assert all((count == 1).all() for count in painted.values())
    assert len(keys) == len(merged.layout.file)


def _fqns(plan):
    return [e.fqn for e in decode_structure(plan.shape.structure)[0]]


@given(worlds(), st.data())
@settings(SEEDED, max_examples=50)
def test_a_missing_chunk_is_refused_by_name(world, data):
    num_ranks, tensors = world
    e, boxes = data.draw(st.sampled_from(tensors))
    boxes[data.draw(st.sampled_from(sorted(boxes, key=str)))] = set()
    plans = plans_of(num_ranks, tensors)
    if not any(e.fqn in _fqns(plan) for plan in plans):
        return  # nobody knows of the tensor any more

    with pytest.raises(IncompletePlan) as caught:
        merge(plans)
    assert [(p.where, p.kind) for p in caught.value.problems] == [(e.fqn, "hole")]


@given(st.integers(2, 6), st.data())
@settings(SEEDED, max_examples=50)
def test_replicas_that_differ_are_refused_by_name(num_ranks, data):
    odd = data.draw(st.integers(0, num_ranks - 1))
    plans = []
    for rank in range(num_ranks):
        digests = np.full((2, 16), 7, np.uint8)
        digests[1, data.draw(st.integers(0, 15))] += int(rank == odd)
        chunks = [(0, Box((0,), (3,))), (1, Box((0,), (3,)))]
        plans.append(local_plan(rank, [entry("a", (3,)), entry("b", (3,))], chunks, digests))

    with pytest.raises(ReplicaMismatch) as caught:
        merge(plans)
    (problem,) = caught.value.problems
    assert problem.where == "model.b"
    assert str(odd) in problem.message


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
@settings(SEEDED, max_examples=100)
def test_largest_first_is_within_four_thirds_of_the_best(sizes, num_ranks):
    loads = np.zeros(num_ranks, np.int64)
    everyone = [list(range(num_ranks))] * len(sizes)

    writers, cut = assign_writers(np.array(sizes), everyone, loads, cut_bytes=10**9)

    assert cut == []
    assert sorted(writers) == list(range(len(sizes)))
    choices = itertools.product(range(num_ranks), repeat=len(sizes))
    best = min(int(np.bincount(choice, sizes).max()) for choice in choices)
    assert int(loads.max()) * 3 <= best * 4
    assert int(loads.sum()) == sum(sizes)


@given(
    st.integers(0, 1000),
    st.integers(0, 64),
    st.lists(st.integers(0, 10_000), min_size=1, max_size=9),
)
@settings(SEEDED)
def test_shared_rows_sum_up_and_level_the_holders(num_rows, row_bytes, loads):
    rows = share_rows(num_rows, row_bytes, loads)

    assert sum(rows) == num_rows
    assert min(rows) >= 0
    after = [load + count * row_bytes for load, count in zip(loads, rows, strict=True)]
    given = [total for total, count in zip(after, rows, strict=True) if count]
    # Nobody who gets rows ends more than rounding above the least loaded holder.
    assert not given or max(given) - min(after) <= row_bytes * len(loads)


def test_a_thousand_ranks():
    num_ranks, num_tensors = 1000, 50
    entries = [entry(f"t{n}", (1000 + n, 64)) for n in range(num_tensors)]
    plans = []
    for rank in range(num_ranks):
        # Half of the tensors are replicas, the other half is sharded by rows.
        chunks = []
        for n, e in enumerate(entries):
            rows = e.global_shape[0]
            if n % 2:
                chunks.append((n, Box((0, 0), e.global_shape)))
                continue
            width = math.ceil(rows / num_ranks)
            start, stop = min(rank * width, rows), min((rank + 1) * width, rows)
            if start < stop:
                chunks.append((n, Box((start, 0), (stop - start, 64))))
        plans.append(local_plan(rank, entries, chunks))

    merged = merge(plans)
    parts = [merged.rank_plan(rank) for rank in range(num_ranks)]

    assert sum(len(part.tensor) for part in parts) == len(merged.layout.file)
