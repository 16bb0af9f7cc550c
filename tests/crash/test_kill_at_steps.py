"""Real SIGKILLs at every numbered step of a save: survivors learn of it, the next job resumes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.errors import RankSilent, SaveError
from dcp_resume.events import Event, PhaseFinished, StepReached, subscribe
from tests.support.ranks import Died, Returned

pytestmark = pytest.mark.ranks

WORLD_SIZE = 3
DEADLINE_S = 3.0
COMMITTED = "committed"
"""The coordinator, after the commit is in the log and before it told anyone."""


def state_at(step: int) -> dict[str, Any]:
    """What this rank holds after a step: shards, replicas, and a value."""
    rank = dist.get_rank()
    own = torch.arange(100.0) * step + rank
    return {"model": {f"layers.{rank}.w": own, "norm": torch.full((7,), float(step))}, "n": step}


def is_state_at(state: dict[str, Any], step: int) -> bool:
    expected = state_at(step)
    tensors = expected["model"]
    return state["n"] == step and all(torch.equal(state["model"][k], tensors[k]) for k in tensors)


def killer(point: int | str, victims: tuple[int, ...]) -> Callable[[Event], None]:
    """Kills this process when a victim reaches the point of saving step 2."""

    def look(event: Event) -> None:
        if point == COMMITTED:
            is_there = isinstance(event, PhaseFinished) and event.phase == "commit"
        else:
            is_there = isinstance(event, StepReached) and event.number == point
        if is_there and event.step == 2 and dist.get_rank() in victims:
            os.kill(os.getpid(), signal.SIGKILL)

    return look


def save_and_die(root: str, point: int | str, victims: tuple[int, ...], is_blocking: bool) -> Any:
    """Save step 1, then step 2, during which the victims die; what the survivors learn."""
    mode = SaveMode.BLOCKING if is_blocking else SaveMode.BACKGROUND
    state = state_at(0)
    with CheckpointManager(root, Settings(mode=mode, deadline_s=DEADLINE_S)) as checkpoints:
        assert checkpoints.resume(state) is None
        checkpoints.save(1, state_at(1)).result()
        unsubscribe = subscribe(killer(point, victims))
        started = time.monotonic()
        error: SaveError | None = None
        try:
            checkpoints.save(2, state_at(2)).result()
        except SaveError as failure:
            error = failure
        took_s = time.monotonic() - started
        unsubscribe()
        return error, took_s, checkpoints.steps()


def resume_and_save(root: str) -> Any:
    """The next incarnation: what it resumes, whether that is whole, and whether it can go on."""
    state = state_at(0)
    with CheckpointManager(root, Settings(deadline_s=30)) as checkpoints:
        result = checkpoints.resume(state)
        assert result is not None
        is_whole = is_state_at(state, result.step)
        checkpoints.save(3, state_at(3)).result()
        checkpoints.load(state)
        return result.step, is_whole, is_state_at(state, 3)


CASES = [
    *[(point, (1,), silent) for point, silent in [(1, 1), (2, 1), (3, 1), (5, None)]],
    *[(point, (0,), silent) for point, silent in [(1, 0), (2, 0), (3, 0), (4, 0), (5, None)]],
    (COMMITTED, (0,), None),
    *[(point, (0, 1, 2), None) for point in (1, 2, 3)],
    (4, (0, 1, 2), 0),  # the coordinator alone commits
    (5, (0, 1, 2), None),
]
"""Point, victims, and the rank that survivors must name; None where their save must succeed."""


@pytest.mark.parametrize(("point", "victims", "silent"), CASES)
def test_40_a_kill_leaves_the_old_or_a_whole_checkpoint(ranks, tmp_path, point, victims, silent):
    # The mode alternates: steps 3 to 5 are in the trainer's thread or in the background.
    is_blocking = CASES.index((point, victims, silent)) % 2 == 0
    outcomes = ranks.outcomes(save_and_die, WORLD_SIZE, str(tmp_path), point, victims, is_blocking)

    is_committed = point in (5, COMMITTED)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Died):
            assert outcome.exit_code == -signal.SIGKILL
            assert rank in victims
            continue
        assert isinstance(outcome, Returned), outcome
        error, took_s, steps = outcome.value
        assert took_s < 1.5 * DEADLINE_S
        assert steps == ([1, 2] if is_committed else [1])
        if silent is None:
            assert error is None
        else:
            assert isinstance(error, RankSilent)
            assert error.ranks == (silent,)
            assert error.step == 2
    died = {rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, Died)}
    assert died

    expected_step = 2 if is_committed else 1
    found = ranks.run(resume_and_save, WORLD_SIZE, str(tmp_path))
    assert found == [(expected_step, True, True)] * WORLD_SIZE


@pytest.mark.parametrize(("point", "is_committed"), [(3, False), (COMMITTED, True)])
def test_kill_of_the_coordinator_with_the_vote_store(ranks, tmp_path, point, is_committed):
    """Without torchrun the store of the process group lives in rank 0, and dies with it."""
    outcomes = ranks.outcomes(
        save_and_die, WORLD_SIZE, str(tmp_path), point, (0,), True, is_store_at_rank_0=True
    )

    assert isinstance(outcomes[0], Died)
    for outcome in outcomes[1:]:
        assert isinstance(outcome, Returned), outcome
        error, took_s, steps = outcome.value
        assert took_s < DEADLINE_S  # the store's end is an answer too
        assert steps == ([1, 2] if is_committed else [1])
        assert is_committed if error is None else error.ranks == (0,)
    found = ranks.run(resume_and_save, WORLD_SIZE, str(tmp_path))
    assert found == [(2 if is_committed else 1, True, True)] * WORLD_SIZE
