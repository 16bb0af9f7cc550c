"""The power goes during a save: what is there once it is back, on a real ext4.

A cut before every system call of a save that changes the disk or syncs it, and one on several ranks
at every numbered step. What `save` acknowledged must be there, and all that counts be whole.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, RetryPolicy, SaveMode, Settings
from dcp_resume.errors import DcpResumeError
from dcp_resume.events import Event, PhaseFinished, StepReached, subscribe
from dcp_resume.storage import open_store
from tests.support.ext4_disk import CannotMount, Cut, Ext4Disk, in_memory
from tests.support.inspection import look_at

SETTINGS = Settings(mode=SaveMode.BLOCKING, deadline_s=10, retry=RetryPolicy(deadline_s=0.2))
CALLS = frozenset({"mkdir", "open", "writev", "fsync", "rename", "link", "unlink"})
NUM_FLOATS = 20_000


def state_at(step: int) -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = torch.full((NUM_FLOATS,), float(step + rank))
    return {"model": {f"w{rank}": own}, "optim": {f"m{rank}": own + 1}, "step": step}


def is_at(state: dict[str, Any], step: int) -> bool:
    expected = state_at(step)
    return state["step"] == step and all(
        torch.equal(tensor, expected[part][name])
        for part in ("model", "optim")
        for name, tensor in state[part].items()
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Ext4Disk]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Ext4Disk.new(stack.enter_context(in_memory(tmp_path))))
        except CannotMount as error:
            pytest.skip(f"NOT TESTED: a power cut needs an ext4 on a loop device: {error}")
        yield made


@contextlib.contextmanager
def before_call(number: int | None, act: Callable[[], None]) -> Iterator[list[str]]:
    """Act before one of the library's system calls; yields the names of those made so far."""
    made: list[str] = []

    def look(frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or "/dcp_resume/storage/posix_" not in frame.f_code.co_filename:
            return
        if function.__module__ == "posix" and function.__name__ in CALLS:
            if len(made) == number:
                act()
            made.append(function.__name__)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield made
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def save_second(root: Path, number: int | None, act: Callable[[], None]) -> tuple[bool, list[str]]:
    """Save step 2; whether that was acknowledged, and the system calls it took."""
    with CheckpointManager(root, SETTINGS) as checkpoints:
        assert checkpoints.resume(state_at(0)).step == 1
        with before_call(number, act) as made:
            try:
                checkpoints.save(2, state_at(2))
            except DcpResumeError:
                return False, made
        return True, made


def check(root: Path, *, is_acknowledged: bool) -> int:
    """What counts is whole, and a next start goes on from it; the step it resumed from."""
    with contextlib.closing(open_store(str(root))) as store:
        found = look_at(store)
    assert found.problems == ()
    assert found.strays == ()
    assert found.steps in ([(1, 2)] if is_acknowledged else [(1,), (1, 2)])
    state = state_at(0)
    with CheckpointManager(root, SETTINGS) as checkpoints:
        resumed = checkpoints.resume(state).step
        assert resumed == found.steps[-1]
        assert is_at(state, resumed)
        checkpoints.save(3, state_at(3))
        assert checkpoints.steps() == [*found.steps, 3]
        checkpoints.load(state)
    assert is_at(state, 3)
    return resumed


@pytest.mark.parametrize("cut", Cut)
def test_40_a_cut_before_any_system_call_leaves_the_old_or_a_whole_checkpoint(disk, cut):
    with CheckpointManager(disk.root / "run", SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
    disk.unmount()
    with disk.copied(disk.image.parent / "uncut") as uncut:
        _, calls = save_second(uncut.root / "run", None, lambda: None)
    assert set(calls) == CALLS

    resumed = []
    for number in range(len(calls) + 1):  # the last cut comes after the save
        with disk.copied(disk.image.parent / f"cut-{number}") as victim:
            root = victim.root / "run"
            stop = functools.partial(victim.cut_power, cut)
            is_acknowledged, made = save_second(root, number, stop)
            if number == len(calls):
                assert is_acknowledged
                stop()
            else:
                assert made[: number + 1] == calls[: number + 1]
            victim.restart()
            resumed.append(check(root, is_acknowledged=is_acknowledged))
    assert resumed == sorted(resumed)
    assert set(resumed) == {1, 2}


def test_a_disk_that_lies_about_syncs_loses_what_was_acknowledged(disk, monkeypatch):
    """So the cuts above would show a sync that is missing."""
    root = disk.root / "run"
    with CheckpointManager(root, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        checkpoints.save(2, state_at(2))
        assert checkpoints.steps() == [1, 2]
    disk.cut_power(Cut.NOW)
    disk.restart()
    with contextlib.closing(open_store(str(root))) as store:
        assert look_at(store).steps == (1,)


WORLD_SIZE = 2
COMMITTED = "committed"
"""The commit is in the log, and nobody was told."""
POINTS = [1, 2, 3, "written", 4, COMMITTED, 5]


def save_through_a_cut(disk: Ext4Disk, point: int | str) -> Any:
    """Save steps 1 and 2, the power going at a point of the second; what each rank learns."""

    def look(event: Event) -> None:
        if isinstance(event, PhaseFinished):
            place = {"write": "written", "commit": COMMITTED}.get(event.phase)
        else:
            place = event.number if isinstance(event, StepReached) else None
        if place == point and event.step == 2 and dist.get_rank() == 0:
            disk.cut_power(Cut.NOW)

    checkpoints = CheckpointManager(disk.root / "run", SETTINGS)
    checkpoints.save(1, state_at(1))
    unsubscribe = subscribe(look)
    try:
        checkpoints.save(2, state_at(2))
    except DcpResumeError as error:
        return error
    finally:
        unsubscribe()
        checkpoints.close()
    return None


def resume_and_save(root: Path) -> Any:
    state = state_at(0)
    with CheckpointManager(root, SETTINGS) as checkpoints:
        resumed = checkpoints.resume(state).step
        is_exact = is_at(state, resumed)
        checkpoints.save(3, state_at(3))
        return resumed, is_exact, checkpoints.steps()


@pytest.mark.ranks
@pytest.mark.parametrize("point", POINTS)
def test_40_a_cut_at_a_step_of_a_save_of_several_ranks(ranks, disk, point):
    root = disk.root / "run"
    errors = ranks.run(save_through_a_cut, WORLD_SIZE, disk, point)
    is_committed = point in (COMMITTED, 5)
    if is_committed:
        assert errors == [None] * WORLD_SIZE
    else:
        assert all(isinstance(error, DcpResumeError) for error in errors), errors

    disk.restart()
    expected = (1, 2) if is_committed else (1,)
    with contextlib.closing(open_store(str(root))) as store:
        found = look_at(store)
    assert (found.steps, found.problems, found.strays) == (expected, (), ())
    went_on = (expected[-1], True, [*expected, 3])
    assert ranks.run(resume_and_save, WORLD_SIZE, root) == [went_on] * WORLD_SIZE
