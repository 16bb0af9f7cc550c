"""Every interleaving of the smallest cases that can go wrong, on the real code."""

from __future__ import annotations

import pytest

from .programs import (
    cleaner,
    elders_of_parent,
    initial_objects,
    policy_pruner,
    pruner,
    quarantiner,
    trainer,
)
from .world import POLICY, explore, start

FULL = {40: ("a", ()), 60: ("b", ())}
INCREMENTAL = {40: ("a", ()), 60: ("b", ("a",))}
THREE = {20: ("a", ()), 40: ("b", ()), 60: ("c", ())}
ZOMBIE, SUCCESSOR = frozenset({0}), frozenset({1})


@pytest.mark.parametrize("checkpoints", [FULL, INCREMENTAL], ids=["full", "incremental"])
def test_zombie_successor_pruner(checkpoints):
    programs = [trainer("z", (80,), generation=1), trainer("s", (80,)), pruner(2)]
    found = explore(start(initial_objects(checkpoints), programs), may_crash=ZOMBIE)
    assert found.bad == {}
    assert found.num_states > 10_000
    assert found.ends == {"Fenced"}


@pytest.mark.parametrize("checkpoints", [FULL, INCREMENTAL], ids=["full", "incremental"])
def test_lost_answers_of_a_zombie_that_saves_on(checkpoints):
    programs = [trainer("z", (80, 100), generation=1), trainer("s", (80,))]
    state = start(initial_objects(checkpoints), programs)
    found = explore(state, may_crash=ZOMBIE, may_lose=ZOMBIE | SUCCESSOR)
    assert found.bad == {}
    assert found.ends == {"Fenced", "OutcomeUnknown"}


def test_lost_answers_of_a_pruner():
    programs = [trainer("z", (80,), generation=1), pruner(1), pruner(1)]
    state = start(initial_objects(INCREMENTAL), programs)
    found = explore(state, may_crash=frozenset({0, 1}), may_lose=frozenset({1}))
    assert found.bad == {}


def test_two_successors_race_for_the_run():
    programs = [trainer("z", (80,), generation=1), trainer("s", (80,)), trainer("t", (80,))]
    found = explore(start(initial_objects(INCREMENTAL), programs), may_crash=ZOMBIE | SUCCESSOR)
    assert found.bad == {}


@pytest.mark.parametrize("other", [pruner(1), policy_pruner(POLICY)], ids=["any", "by policy"])
def test_incremental_commits_refer_to_elders_alone_while_these_are_pruned(other):
    """What lies between is free to go; files of an elder, retired or not, must stay."""
    checkpoints = {20: ("a", ()), 40: ("b", ("a",)), 60: ("c", ("a",))}
    writer = trainer("z", (80, 100), generation=1, share=elders_of_parent)
    programs = [writer, trainer("s", (120,), share=elders_of_parent), other]
    found = explore(start(initial_objects(checkpoints), programs), may_crash=ZOMBIE)
    assert found.bad == {}
    assert found.num_states > 1_000


def test_a_parent_is_quarantined_while_its_child_is_written():
    programs = [trainer("z", (80, 100), generation=1), quarantiner(3), pruner(2)]
    found = explore(start(initial_objects(INCREMENTAL), programs), may_crash=ZOMBIE)
    assert found.bad == {}


def test_a_rollback_saves_a_retired_step_again():
    anew = trainer("rollback", (40,), choose_source=lambda _: None)
    programs = [trainer("z", (80,), generation=1), anew, pruner(2)]
    found = explore(start(initial_objects(FULL), programs), may_crash=ZOMBIE)
    assert found.bad == {}


def resumes_from_40(history):
    """An explicit resume, of a checkpoint that a policy may be about to retire."""
    entry = history.find_step(40)
    return entry.seq if entry else history.newest().seq


def test_prune_races_a_resume_of_what_it_would_retire():
    programs = [trainer("rollback", (50,), choose_source=resumes_from_40), pruner(2)]
    state = start(initial_objects(INCREMENTAL), programs)
    found = explore(state, may_lose=SUCCESSOR)
    assert found.bad == {}


@pytest.mark.parametrize(
    "other",
    [trainer("z", (80,), generation=1), policy_pruner(POLICY)],
    ids=["a job that commits", "another pruner"],
)
def test_a_policy_prunes_while_a_checkpoint_is_found_damaged_beside(other):
    """What the record before a ``retire`` says must not be against the policy."""
    programs = [other, policy_pruner(POLICY), quarantiner(4)]
    found = explore(start(initial_objects(THREE), programs))
    assert found.bad == {}
    assert found.num_states > 1000


@pytest.mark.parametrize("checkpoints", [FULL, INCREMENTAL], ids=["full", "incremental"])
def test_a_cleaner_meets_attempts_that_are_about_to_commit(checkpoints):
    programs = [trainer("z", (80,), generation=1), trainer("s", (80,)), cleaner(rounds=2)]
    state = start(initial_objects(checkpoints), programs)
    found = explore(state, may_crash=ZOMBIE, may_lose=ZOMBIE)
    assert found.bad == {}
    assert found.num_states > 10_000


def test_a_cleaner_meets_a_pruner_whose_answers_are_lost():
    programs = [trainer("z", (80,), generation=1), pruner(1), cleaner()]
    state = start(initial_objects(INCREMENTAL), programs)
    found = explore(state, may_crash=SUCCESSOR, may_lose=frozenset({1, 2}))
    assert found.bad == {}
