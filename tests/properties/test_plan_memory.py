"""Plans that are agreed by reference are those that the same ranks would make anew."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_resume.errors import IncompletePlan, InvalidDocument, ReplicaMismatch, StateError
from dcp_resume.format.leaves import pack_leaves
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.merge import merge
from dcp_resume.planning.plans import (
    LocalPlan,
    PlanContents,
    PlanShape,
    encode_structure,
)
from dcp_resume.session.plan_memory import PlanMemory

ROWS = 12


def entry(name, kind="sharded", dtype="float32"):
    path = ("model", name)
    return TensorEntry(
        fqn=".".join(path),
        path=path,
        part="model",
        dtype=dtype,
        global_shape=(ROWS, 2),
        kind=kind,
    )


def offered(rank, world_size, names=("a", "b"), digest=b"=", values=None, dtype="float32"):
    """A plan: tensors cut by rows over the ranks, and one that is compared."""
    entries = [entry(name, dtype=dtype) for name in names] + [entry("all", "replicated")]
    bounds = [ROWS * r // world_size for r in (rank, rank + 1)]
    own = Box((bounds[0], 0), (bounds[1] - bounds[0], 2))
    boxes = [*[own] * len(names), Box((0, 0), (ROWS, 2))]
    listed, box = Boxes.listing(boxes, 2)
    shape = PlanShape(
        rank=rank,
        world_size=world_size,
        structure=encode_structure(entries, []),
        tensor=np.arange(len(boxes), dtype=np.int32),
        box=box,
        boxes=listed,
        compared=np.array([len(names)], np.int32),
    )
    leaves = {fqn: (tuple(fqn.split(".")), value) for fqn, value in (values or {}).items()}
    return LocalPlan(shape, PlanContents(digest * 16, pack_leaves(leaves)))


def agree(memories, plans, lost=()):
    """One agreement.

    Returns:
        Each rank's plan by rank, of those that heard, and whether it was a reference.
    """
    coordinator = memories[0]
    ballots = [memory.ballot(plan) for memory, plan in zip(memories, plans, strict=True)]
    if not coordinator.can_merge(ballots):
        ballots = [memory.full_ballot(p) for memory, p in zip(memories, plans, strict=True)]
        assert coordinator.can_merge(ballots)
    answers = coordinator.answers(ballots, coordinator.merge(ballots))
    heard = [rank for rank in range(len(plans)) if rank not in lost]
    learned = {rank: memories[rank].learn(answers[rank], plans[rank]) for rank in heard}
    return learned, {PlanMemory.is_remembered(answer) for answer in answers}


def fields_of(plan):
    found = {field.name: getattr(plan, field.name) for field in fields(plan)}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}


def check(learned, plans):
    fresh = merge(plans)
    for rank, plan in learned.items():
        assert fields_of(plan) == fields_of(fresh.rank_plan(rank))


def outcome(action):
    """What an action returns, or the refusal that it raises."""
    try:
        return action()
    except StateError as error:
        return error


STRUCTURES = [
    {},
    {"names": ("a", "c")},
    {"names": ("a", "b", "c")},
    {"names": ("b", "a")},
    {"dtype": "int64"},
]
CONTENTS = [
    {},
    {"digest": b"!"},
    {"values": {"x.n": 1, "y.n": [1, 2]}},
    {"values": {"x.n": "long" * 20_000}},
    {"values": {"x.n": "long" * 20_001}},
    {"values": {"x.n": "long" * 40_000, "y.n": "also" * 40_000}},
]
ODD = [None, {"digest": b"?"}, {"values": {"x.n": "odd"}}, {"dtype": "int16"}, {"names": ()}]

saves = st.lists(
    st.tuples(
        st.sampled_from(STRUCTURES),
        st.sampled_from(CONTENTS),
        st.sampled_from(ODD),
        st.sets(st.integers(0, 2)),
    ),
    min_size=1,
    max_size=6,
)


@given(saves)
@settings(derandomize=True, deadline=None, max_examples=150)
def test_any_row_of_saves_with_lost_answers_and_refusals(saves):
    memories = [PlanMemory() for _ in range(3)]
    for structure, contents, odd, lost in saves:
        plans = [offered(rank, 3, **structure, **contents) for rank in range(3)]
        if odd is not None:
            plans[1] = offered(1, 3, **{**structure, **contents, **odd})
        found = outcome(lambda: agree(memories, plans, lost)[0])  # noqa: B023
        fresh = outcome(lambda: merge(plans))  # noqa: B023
        if isinstance(fresh, StateError):
            assert (type(found), str(found)) == (type(fresh), str(fresh))
        else:
            check(found, plans)


def test_the_same_shapes_are_agreed_by_reference():
    memories = [PlanMemory() for _ in range(3)]
    found = []
    for contents in (CONTENTS[0], CONTENTS[1], CONTENTS[2], CONTENTS[3], CONTENTS[4], CONTENTS[5]):
        plans = [offered(rank, 3, **contents) for rank in range(3)]
        learned, is_reference = agree(memories, plans)
        check(learned, plans)
        found.append(is_reference)

    # The fourth has values that the manifest cannot hold, the last more of them.
    assert found == [{False}, {True}, {True}, {False}, {True}, {False}]


@pytest.mark.parametrize("lost", [{0}, {1}, {0, 1, 2}])
def test_an_answer_that_got_lost_leads_to_plans_in_full(lost):
    memories = [PlanMemory() for _ in range(3)]
    plans = [offered(rank, 3) for rank in range(3)]
    agree(memories, plans, lost)

    assert agree(memories, plans)[1] == {False}
    assert agree(memories, plans)[1] == {True}


def test_a_reference_to_what_a_rank_does_not_know_is_refused():
    memories = [PlanMemory() for _ in range(2)]
    plans = [offered(rank, 2) for rank in range(2)]
    agree(memories, plans)
    ballots = [memory.ballot(plan) for memory, plan in zip(memories, plans, strict=True)]
    answers = memories[0].answers(ballots, memories[0].merge(ballots))

    with pytest.raises(InvalidDocument, match="remembers none"):
        PlanMemory().learn(answers[1], plans[1])
    with pytest.raises(InvalidDocument, match="make a new manager"):
        memories[1].learn(answers[1], offered(1, 2, names=("z",)))


def test_a_refused_difference_leaves_the_plan_in_force():
    memories = [PlanMemory() for _ in range(2)]
    plans = [offered(rank, 2) for rank in range(2)]
    agree(memories, plans)

    with pytest.raises(ReplicaMismatch) as caught:
        agree(memories, [plans[0], offered(1, 2, digest=b"x")])

    (problem,) = caught.value.problems
    assert (problem.where, problem.message) == ("model.all", "ranks [0, 1] hold different values")
    assert agree(memories, plans)[1] == {True}


def test_each_part_of_a_shape_is_in_its_fingerprint():
    shape = offered(1, 3).shape
    changes = {
        "rank": 2,
        "world_size": 4,
        "structure": shape.structure + b" ",
        "tensor": shape.tensor[::-1],
        "box": shape.box[::-1],
        "boxes": Boxes(shape.boxes.offsets + 1, shape.boxes.sizes),
        "compared": shape.compared - 1,
    }
    values = {field.name: getattr(shape, field.name) for field in fields(shape)}
    assert changes.keys() == values.keys()
    others = {PlanShape(**{**values, name: value}).fingerprint for name, value in changes.items()}
    assert len(others | {shape.fingerprint}) == len(changes) + 1
    assert PlanShape(**values).fingerprint == shape.fingerprint


def test_ten_thousand_ranks():
    num_ranks = 10_000
    structure = encode_structure(
        [entry("w").model_copy(update={"global_shape": (num_ranks, 2)}), entry("all")], []
    )

    def plan(rank, digest=b"=", compared=1):
        shape = PlanShape(
            rank=rank,
            world_size=num_ranks,
            structure=structure,
            tensor=np.arange(2, dtype=np.int32),
            box=np.arange(2, dtype=np.int32),
            boxes=Boxes(np.array([[rank, 0], [0, 0]]), np.array([[1, 2], [ROWS, 2]])),
            compared=np.arange(compared, 2, dtype=np.int32),
        )
        return LocalPlan(shape, PlanContents(digest * 16, pack_leaves({})))

    memories = [PlanMemory() for _ in range(num_ranks)]
    plans = [plan(rank) for rank in range(num_ranks)]
    learned, is_reference = agree(memories, plans)
    assert is_reference == {False}
    written = sum(len(part.tensor) for part in learned.values())
    assert written == num_ranks + 1

    ballots = [memory.ballot(own) for memory, own in zip(memories, plans, strict=True)]
    assert max(map(len, ballots)) < 100
    answers = memories[0].answers(ballots, memories[0].merge(ballots))
    assert len(set(answers)) == 1

    odd = [*plans[:-1], plan(num_ranks - 1, digest=b"x")]
    ballots = [memory.ballot(own) for memory, own in zip(memories, odd, strict=True)]
    with pytest.raises(ReplicaMismatch, match=f"{num_ranks - 1}"):
        memories[0].merge(ballots)

    ballots[7] = memories[7].ballot(plan(7, digest=b"==", compared=0))
    assert not memories[0].can_merge(ballots)


def test_digests_that_are_fewer_than_announced_are_refused():
    plans = [offered(0, 2), LocalPlan(offered(1, 2).shape, PlanContents(b"", pack_leaves({})))]

    with pytest.raises(IncompletePlan, match="announced 2 digests, sent 16 bytes"):
        merge(plans)
