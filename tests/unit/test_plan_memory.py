"""What ranks tell the coordinator of their plans, and when it asks for more."""

from __future__ import annotations

import pytest
import torch

from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.state import describe_state
from dcp_resume.session.plan_memory import PlanMemory

WORLD_SIZE = 4


def plans(*names_of_ranks):
    """Of each rank the plan of a state of tensors of some names."""
    return [
        local_plan(
            describe_state({name: torch.ones(3) for name in names}, Declarations()),
            rank,
            len(names_of_ranks),
            Declarations(),
        )
        for rank, names in enumerate(names_of_ranks)
    ]


def test_a_structure_that_all_ranks_share_is_sent_once():
    offered = plans(*[["some_name", "another_name"]] * WORLD_SIZE)
    coordinator = PlanMemory()
    ballots = [PlanMemory().ballot(plan) for plan in offered]

    assert [ballot.count(b"another_name") > 0 for ballot in ballots] == [True, False, False, False]
    assert coordinator.can_merge(ballots)
    found, expected = coordinator.merge(ballots), merge(offered)
    assert found.tensors == expected.tensors
    assert found.layout.names == expected.layout.names
    for rank in range(WORLD_SIZE):
        assert found.rank_plan(rank).to_bytes() == expected.rank_plan(rank).to_bytes()


@pytest.mark.parametrize("others", [["mine"], ["mine", "shared"], []])
def test_a_structure_that_the_coordinator_does_not_have_is_asked_for(others):
    offered = plans(["shared"], ["shared"], others)
    coordinator = PlanMemory()
    assert not coordinator.can_merge([PlanMemory().ballot(plan) for plan in offered])

    ballots = [PlanMemory().full_ballot(plan) for plan in offered]
    assert coordinator.can_merge(ballots)
    assert coordinator.merge(ballots).tensors == merge(offered).tensors


def test_a_plan_that_changed_on_one_rank_is_no_remembered_one():
    before, after = plans(["a"], ["a"]), plans(["a"], ["a", "b"])
    ranks = [PlanMemory(), PlanMemory()]
    ballots = [memory.ballot(plan) for memory, plan in zip(ranks, before, strict=True)]
    answers = ranks[0].answers(ballots, ranks[0].merge(ballots))
    for memory, answer, plan in zip(ranks, answers, before, strict=True):
        memory.learn(answer, plan)

    assert ranks[0].can_merge([m.ballot(p) for m, p in zip(ranks, before, strict=True)])
    assert not ranks[0].can_merge([m.ballot(p) for m, p in zip(ranks, after, strict=True)])
