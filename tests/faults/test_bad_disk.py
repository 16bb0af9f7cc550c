"""Saves of a real job on a disk that hangs, is slow, or whose blocks can no longer be written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcp_resume import CheckpointManager, RetryPolicy, SaveMode, Settings
from dcp_resume.errors import StorageError, StorageFull
from dcp_resume.events import Event, StepReached, subscribe
from tests.support.ext4_disk import CannotMount, Ext4Disk, in_memory
from tests.support.inspection import Found, look_at_root
from tests.support.small_state import is_at, state_at
from tests.support.syscalls import slow_syscalls

SETTINGS = Settings(mode=SaveMode.BLOCKING, retry=RetryPolicy(deadline_s=1.0))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            root = stack.enter_context(in_memory(tmp_path))
        except CannotMount as error:
            pytest.skip(f"NOT TESTED: a bad disk needs the right to mount: {error}")
        yield root


@pytest.fixture
def disk(memory: Path) -> Iterator[Ext4Disk]:
    """Sixteen MiB, taken from ``memory`` as they are written."""
    try:
        made = Ext4Disk.new(memory)
    except CannotMount as error:
        pytest.skip(f"NOT TESTED: a bad disk needs an ext4 on a loop device: {error}")
    with made:
        yield made


def fill(path: Path) -> None:
    """Let a file take whatever space there is."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_blocks_that_cannot_be_written_fail_the_save(memory, disk):
    """The device below the file system refuses: what comes up is the error of a sync."""
    run, ballast = disk.root / "run", memory / "ballast"
    state = state_at(0)
    with CheckpointManager(run, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        fill(ballast)
        with pytest.raises(StorageError) as caught:
            checkpoints.save(2, state_at(2))
        assert type(caught.value) is StorageError
        assert checkpoints.load(state).step == 1
    assert is_at(state, 1)

    ballast.unlink()  # the disk was replaced, and the machine started again
    disk.restart()
    assert look_at_root(run).steps == (1,)
    assert look_at_root(run).problems == ()
    with CheckpointManager(run, SETTINGS) as checkpoints:
        assert checkpoints.resume(state).step == 1
        checkpoints.save(2, state_at(2))
    assert look_at_root(run).steps == (1, 2)
    assert look_at_root(run).problems == ()


def test_a_full_ext4_fails_the_save_and_training_goes_on(disk):
    run, ballast = disk.root / "run", disk.root / "ballast"
    with CheckpointManager(run, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        fill(ballast)
        with pytest.raises(StorageFull):
            checkpoints.save(2, state_at(2))
        assert look_at_root(run) == Found((1,), (), (), ())
        ballast.unlink()
        checkpoints.save(3, state_at(3))
    assert look_at_root(run) == Found((1, 3), (), (), ())


def test_no_room_for_more_files_fails_the_save_and_training_goes_on(memory):
    run = memory / "run"
    with CheckpointManager(run, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        num_files = os.statvfs(memory).f_files - os.statvfs(memory).f_ffree + 3
        limit = f"remount,nr_inodes={num_files}"
        subprocess.run(["mount", "-o", limit, str(memory)], check=True)
        with pytest.raises(StorageFull):
            checkpoints.save(2, state_at(2))
        assert look_at_root(run) == Found((1,), (), (), ())
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000", str(memory)], check=True)
        checkpoints.save(3, state_at(3))
    assert look_at_root(run) == Found((1, 3), (), (), ())


def test_a_hung_disk_holds_up_the_save_and_not_the_trainer(disk):
    run = disk.root / "run"
    is_frozen = threading.Event()
    with CheckpointManager(run, Settings(mode=SaveMode.BACKGROUND)) as checkpoints:
        checkpoints.save(1, state_at(1)).result()
        with contextlib.ExitStack() as frozen:

            def freeze(event: Event) -> None:
                if isinstance(event, StepReached) and event.number == 3:
                    frozen.enter_context(disk.hanging())
                    is_frozen.set()

            frozen.callback(subscribe(freeze))
            pending = checkpoints.save(2, state_at(2))
            assert is_frozen.wait(60)
            assert not pending.is_done
        assert pending.result().step == 2
    assert look_at_root(run) == Found((1, 2), (), (), ())


def test_a_slow_disk_only_takes_its_time(tmp_path):
    delay_s = 0.1
    with CheckpointManager(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        with slow_syscalls("fsync,fdatasync", delay_s):
            result = checkpoints.save(2, state_at(2)).result()
    assert result.duration_s > 8 * delay_s  # five files, and their directories
    assert look_at_root(tmp_path) == Found((1, 2), (), (), ())
