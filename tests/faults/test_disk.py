"""Saves and resumes of a real job on a disk that is full, read-only or broken.

Each ends in a typed error at once, with the checkpoint before it whole and no file left that no
rule collects; `docs/explanation/faults.md` has the table.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcp_resume import CheckpointManager, RetryPolicy, SaveMode, Settings
from dcp_resume.errors import CommitUnknown, StorageDenied, StorageError, StorageFull
from tests.support.damage import small_files
from tests.support.inspection import Found, look_at_root
from tests.support.small_state import MIB, is_at, state_at
from tests.support.syscalls import failing_syscalls

SETTINGS = Settings(mode=SaveMode.BLOCKING, retry=RetryPolicy(deadline_s=1.0))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Four MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs the right to mount: {done.stderr.decode()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_full_disk_fails_the_save_and_training_goes_on(disk):
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(2 * MIB))
    run = disk / "run"
    with CheckpointManager(run, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        with pytest.raises(StorageFull):
            checkpoints.save(2, state_at(2))
        assert look_at_root(run) == Found((1,), (), (), ())
        ballast.unlink()
        checkpoints.save(3, state_at(3))
    assert look_at_root(run) == Found((1, 3), (), (), ())


def test_a_disk_that_turned_read_only_can_still_be_loaded_from(disk):
    run = disk / "run"
    state = state_at(0)
    with CheckpointManager(run, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageDenied):
            checkpoints.save(2, state_at(2))
        assert checkpoints.load(state).step == 1
    assert is_at(state, 1)
    assert look_at_root(run) == Found((1,), (), (), ())


def test_a_limit_of_file_sizes(tmp_path):
    with CheckpointManager(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        with small_files(MIB // 2), pytest.raises(StorageError):
            checkpoints.save(2, state_at(2))
        checkpoints.save(3, state_at(3))
    assert look_at_root(tmp_path) == Found((1, 3), (), (), ())


BROKEN = {
    "EIO when writing": ("writev", "EIO", StorageError),
    "EIO when syncing": ("fsync,fdatasync", "EIO", StorageError),
    "EIO when renaming": ("rename,renameat,renameat2", "EIO", StorageError),
    "ENOSPC when writing": ("writev", "ENOSPC", StorageFull),
    "EDQUOT when writing": ("writev", "EDQUOT", StorageFull),
    "EDQUOT when committing": ("link,linkat", "EDQUOT", StorageFull),
    "EACCES when making a directory": ("mkdir,mkdirat", "EACCES", StorageDenied),
    "ESTALE when syncing": ("fsync,fdatasync", "ESTALE", StorageError),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_disk_fails_the_save_and_training_goes_on(tmp_path, name):
    names, error, kind = BROKEN[name]
    with CheckpointManager(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        with failing_syscalls(names, error), pytest.raises(kind) as caught:
            checkpoints.save(2, state_at(2))
        assert look_at_root(tmp_path) == Found((1,), (), (), ())
        checkpoints.save(3, state_at(3))
    assert type(caught.value) is kind
    assert look_at_root(tmp_path) == Found((1, 3), (), (), ())


UNKNOWN = {
    "no sync of the log": ("fsync,fdatasync", "EIO"),
    "no answer of NFS": ("link,linkat", "ETIMEDOUT"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_commit_is_unknown_until_the_disk_says_yes(tmp_path, name):
    """The record may be there, and be gone after a power loss: the next save settles it."""
    names, error = UNKNOWN[name]
    log = tmp_path / "log" if name == "no sync of the log" else None
    with CheckpointManager(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        with failing_syscalls(names, error, path=log), pytest.raises(CommitUnknown):
            checkpoints.save(2, state_at(2))
        assert look_at_root(tmp_path).problems == ()
        checkpoints.save(3, state_at(3))
    assert look_at_root(tmp_path) == Found((1, 2, 3), (), (), ())


@pytest.mark.parametrize("error", ["EIO", "ESTALE", "EACCES"])
@pytest.mark.parametrize("names", ["preadv,preadv2", "openat"])
def test_a_disk_that_cannot_be_read_is_never_a_reason_to_fall_back(tmp_path, names, error):
    state = state_at(0)
    with CheckpointManager(tmp_path, SETTINGS) as checkpoints:
        checkpoints.save(1, state_at(1))
        checkpoints.save(2, state_at(2))
    (path,) = tmp_path.glob("step-00000002/*/shard-*-model-*")
    with CheckpointManager(tmp_path, SETTINGS) as checkpoints:
        for load in (checkpoints.load, checkpoints.resume):
            with failing_syscalls(names, error, path=path), pytest.raises(StorageError):
                load(state)
        assert look_at_root(tmp_path) == Found((1, 2), (), (), ())
        assert checkpoints.resume(state).step == 2
    assert is_at(state, 2)
