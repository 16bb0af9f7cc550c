"""Every interleaving of the smallest cases that can go wrong, on the real code."""

from __future__ import annotations

import pytest

from .programs import initial_objects, pruner, quarantiner, trainer
from .world import explore, start

FULL = {40: ("a", ()), 60: ("b", ())}
INCREMENTAL = {40: ("a", ()), 60: ("b", ("a",))}
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


def test_a_parent_is_quarantined_while_its_child_is_written():
    programs = [trainer("z", (80, 100), generation=1), quarantiner(3), pruner(2)]
    found = explore(start(initial_objects(INCREMENTAL), programs), may_crash=ZOMBIE)
    assert found.bad == {}


def test_a_rollback_saves_a_retired_step_again():
    anew = trainer("rollback", (40,), choose_source=lambda _: None)
    programs = [trainer("z", (80,), generation=1), anew, pruner(2)]
    found = explore(start(initial_objects(FULL), programs), may_crash=ZOMBIE)
    assert found.bad == {}
