"""Plans as bytes, values of all ranks merged, and files named."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from dcp_resume.errors import IncompletePlan, InvalidDocument, ReplicaMismatch
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.plans import LocalPlan, PlanContents, RankPlan
from dcp_resume.planning.state import describe_state

NONE = Declarations()


def plan_of(state, rank=0, world_size=1, declarations=NONE):
    described = describe_state(state, declarations)
    return local_plan(described, rank, world_size, declarations)


def merged(*states, declarations=NONE):
    """The global plan of one state a rank."""
    return merge(
        [plan_of(state, rank, len(states), declarations) for rank, state in enumerate(states)]
    )


def same(a, b):
    """Whether two plans have the same fields."""
    for name in (field.name for field in fields(a)):
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, Boxes):
            assert same(left, right), name
        elif isinstance(left, np.ndarray):
            assert np.array_equal(left, right), name
        else:
            assert left == right, name
    return True


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"n": 1},
        {"w": torch.ones(2, 3), "s": torch.tensor(1.0), "e": torch.ones(0), "n": [1]},
    ],
)
def test_plans_survive_the_wire(state):
    plan = plan_of(state, world_size=2)
    read = LocalPlan.from_bytes(plan.to_bytes())
    assert same(read.shape, plan.shape)
    assert read.contents == plan.contents == PlanContents.from_bytes(plan.contents.to_bytes())
    assert read.shape.fingerprint == plan.shape.fingerprint

    part = merge([plan]).rank_plan(0)
    assert same(RankPlan.from_bytes(part.to_bytes()), part)


@pytest.mark.parametrize("kind", [LocalPlan, RankPlan])
def test_bytes_that_are_no_plan(kind):
    data = plan_of({"w": torch.ones(2)}).to_bytes()
    for bad in (b"", data[:20], b"x" * 100):
        with pytest.raises(InvalidDocument):
            kind.from_bytes(bad)


def test_the_structure_is_equal_on_all_ranks():
    declarations = Declarations(per_rank=("data.*",))
    states = [{"w": torch.ones(2) * r, "data": {"name": "x" * r}} for r in range(3)]

    plans = [plan_of(s, r, 3, declarations) for r, s in enumerate(states)]

    assert len({plan.shape.structure for plan in plans}) == 1


def test_small_values_go_into_the_manifest():
    plan = merged({"a": {"n": 1}}, {"a": {"n": 1}, "b": {"m": 2}})

    assert plan.manifest_values == {"a.n": (("a", "n"), 1), "b.m": (("b", "m"), 2)}
    assert plan.num_values == {"a": 1, "b": 1}
    assert plan.inline == {}


def test_large_values_go_into_a_data_file_part_by_part():
    large = list(range(20_000))
    plan = merged({"big": {"t": large}, "small": {"n": 1}}, {"big": {"t": large}})

    assert set(plan.manifest_values) == {"small.n"}
    assert set(plan.inline) == {"~leaves.big"}
    assert plan.num_values == {"big": 1, "small": 1}
    assert plan.rank_plan(0).inline == plan.inline
    assert plan.rank_plan(1).inline == {}
    assert [file.part for file in plan.rank_plan(0).files] == ["big"]


def test_values_that_differ_name_both():
    with pytest.raises(ReplicaMismatch) as caught:
        merged({"n": 1, "m": "x"}, {"n": 1, "m": "y"}, {"n": 2, "m": "x"})

    found = {problem.where: problem.message for problem in caught.value.problems}
    assert set(found) == {"n", "m"}
    assert "rank 0 has 'x', rank 1 has 'y'" in found["m"]


def test_from_rank_takes_the_value_of_that_rank():
    declarations = Declarations(from_rank={"*": 1})

    plan = merged(*({"n": r, "w": torch.ones(2) * r} for r in range(3)), declarations=declarations)

    assert plan.manifest_values == {"n": (("n",), 1)}
    assert [len(plan.rank_plan(rank).tensor) for rank in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (torch.ones(3), "global_shape"),
        (torch.ones(2, dtype=torch.float64), "dtype"),
    ],
)
def test_ranks_that_contradict_each_other(other, kind):
    with pytest.raises(IncompletePlan) as caught:
        merged({"w": torch.ones(2)}, {"w": other})

    assert [(p.where, p.kind) for p in caught.value.problems] == [("w", kind)]
    assert "rank 1" in caught.value.problems[0].message


def test_per_rank_tensors_are_stacked():
    declarations = Declarations(per_rank=("rng",))

    plan = merged(*({"rng": torch.arange(4)} for _ in range(3)), declarations=declarations)

    (entry,) = plan.tensors
    assert (entry.kind, entry.global_shape) == ("per_rank", (3, 4))
    assert [plan.rank_plan(rank).offsets[0].tolist()[:2] for rank in range(3)] == [
        [0, 0],
        [1, 0],
        [2, 0],
    ]


def test_files_are_named_by_rank_and_part():
    state = {"model": {"w": torch.ones(2)}, "My Part!": {"v": torch.ones(2)}}

    names = [file.name for file in merged(state).rank_plan(0).files]

    assert names == [
        "shard-00001-my.part-00001-of-00001.safetensors",
        "shard-00001-model-00001-of-00001.safetensors",
    ]


def test_parts_whose_names_look_alike_in_keys():
    state = {name: {"w": torch.ones(2)} for name in ("a b", "a_b", "A.B")}

    names = [file.name for file in merged(state).rank_plan(0).files]

    assert len(set(names)) == 3


def test_wide_dtypes_come_first_in_a_file():
    state = {"m": {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.int64)}}

    plan = merged(state).rank_plan(0)

    assert [key for _, _, key, _, _ in plan.rows(["m.a", "m.b"])] == ["m.b", "m.a"]
