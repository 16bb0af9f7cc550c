"""A disk that is mounted read-only, and a store whose create replaces."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dcp_resume.errors import StorageDenied, UnsupportedStore
from dcp_resume.storage import check_exclusive_create, open_store


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"a read-only disk needs the right to mount: {done.stderr.decode()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_read_only_disk_is_denied(disk: Path) -> None:
    store = open_store(str(disk))
    store.write("old", [memoryview(b"old")])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    calls: list[Callable[[], object]] = [
        lambda: store.write("new", [memoryview(b"new")]),
        lambda: store.create("log/1", b"{}"),
        lambda: store.delete(["old"]),
        lambda: store.prepare("step-1/"),
    ]
    for call in calls:
        with pytest.raises(StorageDenied):
            call()
    assert store.read("old", max_bytes=3) == b"old"


def test_the_probe_refuses_a_store_that_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    monkeypatch.setattr(
        type(store), "create", lambda self, key, data: self.write(key, [memoryview(data)])
    )
    with pytest.raises(UnsupportedStore, match="exclusive"):
        check_exclusive_create(store, "log/")
    assert list(store.list("")) == []
