"""A fault of one rank is the same named error on every rank, in time, and training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, SaveMode, Settings, WhenBusy
from dcp_resume.errors import (
    ConfigurationError,
    DcpResumeError,
    RankErrors,
    SaveInProgress,
    StoreNotShared,
)
from tests.support.damage import small_files

pytestmark = pytest.mark.ranks

DEADLINE_S = 40.0
BLOCKING = Settings(mode=SaveMode.BLOCKING, deadline_s=DEADLINE_S)
BACKGROUND = Settings(mode=SaveMode.BACKGROUND, deadline_s=DEADLINE_S)


def error_of(action: Callable[[], object]) -> DcpResumeError | None:
    """What an action raises; fails if it took until the deadline."""
    started = time.monotonic()
    try:
        action()
    except DcpResumeError as error:
        assert time.monotonic() - started < DEADLINE_S / 2
        return error
    return None


def sharded(num_bytes_a_rank: int = 64) -> dict[str, Any]:
    """A state in which every rank has bytes of its own to write."""
    own = torch.full((num_bytes_a_rank // 4,), float(dist.get_rank()))
    return {"model": {f"layers.{dist.get_rank()}.weight": own}}


class Refusing:
    """A Stateful that cannot say its state."""

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise RuntimeError("no state today")


def save_with_bad_leaf(root: str) -> list[Any]:
    leaf = object() if dist.get_rank() == 1 else 1
    with CheckpointManager(root, BLOCKING) as checkpoints:
        error = error_of(lambda: checkpoints.save(1, {**sharded(), "extra": {"leaf": leaf}}))
        checkpoints.save(2, sharded())
        return [error, checkpoints.steps()]


def save_with_bad_object(root: str) -> list[Any]:
    extra: Any = Refusing() if dist.get_rank() == 2 else {"n": 1}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        error = error_of(lambda: checkpoints.save(1, {**sharded(), "extra": extra}))
        checkpoints.save(2, sharded())
        return [error, checkpoints.steps()]


@pytest.mark.parametrize(
    ("function", "rank", "name"),
    [
        (save_with_bad_leaf, 1, "UnsupportedLeaf: "),
        (save_with_bad_object, 2, "RuntimeError: no state today"),
    ],
)
def test_state_of_one_rank_cannot_be_saved(ranks, tmp_path, function, rank, name):
    found = ranks.run(function, 3, str(tmp_path))

    for error, steps in found:
        assert isinstance(error, RankErrors)
        assert list(error.errors) == [rank]
        assert error.errors[rank].startswith(name)
        assert steps == [2]


def save_on_failing_disk(root: str) -> list[Any]:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, sharded())
        with small_files(100_000, is_on=dist.get_rank() == 1):
            error = error_of(lambda: checkpoints.save(2, sharded(1_000_000)))
        steps = checkpoints.steps()
        checkpoints.save(3, sharded(1_000_000))
        return [error, steps, checkpoints.steps()]


def test_49_a_store_that_fails_one_rank_fails_the_save_on_all(ranks, tmp_path):
    found = ranks.run(save_on_failing_disk, 2, str(tmp_path))

    for error, steps_after_failure, steps in found:
        assert isinstance(error, RankErrors)
        assert error.step == 2
        assert list(error.errors) == [1]
        assert error.errors[1].startswith("Storage")
        assert "shard-00002-model" in error.errors[1]
        assert steps_after_failure == [1]
        assert steps == [1, 3]


def train_while_a_save_fails(root: str) -> list[Any]:
    with CheckpointManager(root, BACKGROUND) as checkpoints:
        checkpoints.save(1, sharded())
        checkpoints.wait()
        with small_files(100_000, is_on=dist.get_rank() == 1):
            pending = checkpoints.save(2, sharded(1_000_000))
            sums = []
            while True:  # the training's own collectives, until every rank knows the outcome
                busy = torch.tensor([int(not pending.is_done), 1])
                dist.all_reduce(busy)
                sums.append(int(busy[1]))
                if not busy[0]:
                    break
        error = error_of(lambda: checkpoints.save(3, sharded()))
        checkpoints.save(4, sharded())
        checkpoints.wait()
        return [set(sums), error, checkpoints.steps()]


def test_background_fault_surfaces_at_next_call_and_training_goes_on(ranks, tmp_path):
    found = ranks.run(train_while_a_save_fails, 2, str(tmp_path))

    for sums, error, steps in found:
        assert sums == {2}
        assert isinstance(error, RankErrors)
        assert (error.step, list(error.errors)) == (2, [1])
        assert steps == [1, 4]


def save_different_steps(root: str) -> DcpResumeError | None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        return error_of(lambda: checkpoints.save(10 + dist.get_rank(), sharded()))


def test_49_different_steps_are_refused_on_all_ranks(ranks, tmp_path):
    for error in ranks.run(save_different_steps, 3, str(tmp_path)):
        assert isinstance(error, ConfigurationError)
        assert "rank 0 saves 10, others {1: 11, 2: 12}" in str(error)


def use_local_roots(root: str, is_resumed: bool) -> DcpResumeError | None:
    node = dist.get_rank() // 2
    with CheckpointManager(f"{root}/node{node}", BLOCKING) as checkpoints:
        if is_resumed:
            return error_of(lambda: checkpoints.resume(sharded()))
        return error_of(lambda: checkpoints.save(1, sharded()))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_roots_that_are_not_shared(ranks, tmp_path, is_resumed):
    for error in ranks.run(use_local_roots, 4, str(tmp_path), is_resumed):
        assert isinstance(error, StoreNotShared)
        assert error.ranks == (2, 3)
    assert not list(tmp_path.rglob("step-*"))


def save_while_rank_1_is_busy(root: str) -> list[Any]:
    settings = Settings(when_busy=WhenBusy.REFUSE, deadline_s=DEADLINE_S)
    with CheckpointManager(root, settings) as checkpoints:
        pending = checkpoints.save(1, sharded())
        pending.result()
        dist.barrier()
        checkpoints.save(2, sharded(50_000_000 if dist.get_rank() else 64))
        error = error_of(lambda: checkpoints.save(3, sharded()))
        checkpoints.wait()
        checkpoints.save(4, sharded())
        checkpoints.wait()
        return [type(error), checkpoints.steps()]


def test_second_save_is_refused_alike_on_all_ranks(ranks, tmp_path):
    found = ranks.run(save_while_rank_1_is_busy, 2, str(tmp_path))

    assert found == [[SaveInProgress, [1, 2, 4]]] * 2


def use_three_managers(root: str) -> list[Any]:
    found = []
    for number in range(3):
        with CheckpointManager(root, BACKGROUND) as checkpoints:
            state = sharded()
            result = checkpoints.resume(state)
            found.append(result and result.step)
            checkpoints.save(number, state)
    return [*found, checkpoints.settings.deadline_s]


def test_managers_in_sequence_on_one_process_group(ranks, tmp_path):
    assert ranks.run(use_three_managers, 2, str(tmp_path)) == [[None, 0, 1, DEADLINE_S]] * 2
