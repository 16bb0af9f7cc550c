"""Long random schedules: crashes, lost and late answers, stale listings, faults of the store.

Replay one: ``SIMULATION_SEED=17 pytest tests/simulation/test_seeds.py -k replay``.
"""

from __future__ import annotations

import os
import random

import pytest

from .programs import (
    cleaner,
    elders_of_parent,
    initial_objects,
    pruner,
    quarantiner,
    trainer,
)
from .scripted import Answer, Question
from .world import State, lose, new_shelf, start

NUM_SEEDS = 300
MAX_EVENTS = 400
CHECKPOINTS = {20: ("a", ()), 40: ("b", ("a",)), 60: ("c", ("a", "b"))}


def build_first_state() -> State:
    """Fresh actors: those of another test remember what its code did."""
    programs = [
        trainer("z", (80, 80, 100, 120), generation=1),
        trainer("s", (80, 100, 120)),
        trainer("t", (100, 120, 140), patience=4),
        trainer("rollback", (60, 80), choose_source=lambda history: min(history.live_commits())),
        trainer("u", (80, 100), full=True),
        trainer("e", (80, 100, 120), share=elders_of_parent),
        pruner(3),
        pruner(2),
        quarantiner(4),
        cleaner(),
    ]
    return start(initial_objects(CHECKPOINTS), programs)


@pytest.fixture(scope="module")
def first_state() -> State:
    return build_first_state()


def simulate(state: State, seed: int) -> list[str]:
    """Run one schedule; raises AssertionError with the seed and its trace at a bad state."""
    dice = random.Random(seed)
    # A table of shelves for each seed: what one schedule wrote is of no use to the next.
    state = State(new_shelf(state.shelf.objects), state.actors)
    weights = [dice.choice((1, 3, 10)) for _ in state.actors]
    trouble = dice.choice((0.0, 0.02, 0.1, 0.3))
    trace: list[str] = []
    for _ in range(MAX_EVENTS):
        ready = [actor for actor in range(len(state.actors)) if state.question(actor)]
        if not ready and not state.in_flight:
            break
        if state.in_flight and (not ready or dice.random() < 0.1):
            put = dice.choice(sorted(state.in_flight))
            trace.append(f"lands: {put[0]}")
            state = state.land(put)
        else:
            actor = dice.choices(ready, [weights[actor] for actor in ready])[0]
            state = _event(state, actor, dice, trouble, trace)
        bad = state.shelf.violations(state.acknowledged())
        assert not bad, f"seed {seed}: {bad}\n" + "\n".join(trace)
    return trace


def _event(
    state: State, actor: int, dice: random.Random, trouble: float, trace: list[str]
) -> State:
    question = state.question(actor)
    assert question is not None
    label = f"{actor}: {question.verb} {question.key}"
    if dice.random() >= trouble:
        trace.append(label)
        return state.step(actor, question)
    fate = dice.choice(("crash", "fault", "fault", "fault"))
    if fate == "crash":
        is_flying = question.verb == "create" and dice.random() < 0.5
        trace.append(f"{label}, dies{' with it in flight' * is_flying}")
        return state.crash(actor, (question.key, question.data) if is_flying else None)
    if question.verb == "create":
        lost = dice.choice(("landed", "flying", "dropped"))
        trace.append(f"{label}, answer lost: {lost}")
        return lose(state, actor, question, lost)
    answer = _fault(state, question, dice)
    trace.append(f"{label}, {answer[0]} {len(str(answer[1]))}")
    return state.answer(actor, state.shelf, answer)


def _fault(state: State, question: Question, dice: random.Random) -> Answer:
    if question.verb == "list":
        _, keys = state.shelf.after(question)[1]
        return "value", keys[: dice.randint(0, len(keys))]
    return "raise", "StorageError"


@pytest.mark.parametrize("block", range(10))
def test_seeds(first_state, block):
    size = NUM_SEEDS // 10
    for seed in range(block * size, (block + 1) * size):
        simulate(first_state, seed)


def test_seeds_reach_what_they_are_for(first_state):
    text = "\n".join("\n".join(simulate(first_state, seed)) for seed in range(40))
    for event in ("lands:", "dies with it in flight", "lost: landed", "list log/, value", "delete"):
        assert event in text


def test_a_seed_replays(first_state):
    assert simulate(first_state, 7) == simulate(build_first_state(), 7)


@pytest.mark.skipif("SIMULATION_SEED" not in os.environ, reason="replays SIMULATION_SEED")
def test_replay(first_state):
    print("\n".join(simulate(first_state, int(os.environ["SIMULATION_SEED"]))))
