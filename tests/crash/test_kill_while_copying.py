"""Real SIGKILLs of ``dcp-resume cp``, amid a file and at each step of its end; then once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.cli.main import main
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from dcp_resume.storage.posix_store import PosixStore
from dcp_resume.storage.s3_store import S3Store

WINDOWS = 3 * 2**18
"""Elements of 4 bytes that take several windows of a copy from files."""
PARTS = 5 * 2**20
"""Elements of 4 bytes that are uploaded in parts."""
BUFFERS = "buffers"
"""What a file is written from; other points are keys that are about to be written."""


def copy_and_die(words: list[str], point: str, count: int) -> None:
    """Call the verb, and kill this process at the ``count``-th time that it comes to ``point``."""
    left = [count]

    def reach(where: str) -> None:
        left[0] -= point in where
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for kind in (PosixStore, S3Store):
        watch(kind, reach)
    sys.exit(main(words))


def watch(kind: Any, reach: Any) -> None:
    write, create = kind.write, kind.create

    def watched(buffers: Iterable[memoryview]) -> Iterator[memoryview]:
        for buffer in buffers:
            reach(BUFFERS)
            yield buffer

    def watched_write(self: Any, key: str, buffers: Any, *, size: int | None = None) -> int:
        reach(key)
        given = buffers if size is None else watched(buffers)
        return int(write(self, key, given, size=size))

    def watched_create(self: Any, key: str, data: bytes) -> None:
        reach(key)
        create(self, key, data)

    kind.write, kind.create = watched_write, watched_create


def save_run(root: Path, size: int) -> None:
    state = {"model": {"w": torch.arange(size, dtype=torch.float32), "b": torch.ones(3)}}
    state["optim"] = {"m": torch.ones(1000)}
    with CheckpointManager(root, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.save(7, state)


def kill_copy(words: list[str], point: str, count: int) -> None:
    arguments = json.dumps([words, point, count])
    code = f"from {__name__} import copy_and_die; copy_and_die(*{arguments})"
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, (point, killed.stdout, killed.stderr)


def copy_again(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    return dict(found)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("step-*/*/[!.]*")}


@pytest.mark.parametrize(
    ("point", "count", "is_kept"),
    [
        (BUFFERS, 2, False),  # amid the first files
        ("chunk-index", 1, True),
        ("manifest.json", 1, True),
        ("-race-", 3, True),
        ("log/", 1, True),
        ("log/", 2, True),  # the run is open, the checkpoint does not count yet
    ],
)
def test_a_killed_copy_counts_for_nothing_and_goes_on(
    point: str, count: int, is_kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    save_run(source, WINDOWS)
    words = ["cp", str(source), str(target)]
    kill_copy(words, point, count)
    assert RunLog(open_store(str(target))).refresh().newest() is None
    found = copy_again(words, capsys)
    assert found["outcome"] == "copied"
    data = sum(len(content) for name, content in files(source).items() if "shard-" in name)
    assert found["num_bytes"] + found["kept_bytes"] == data
    assert (found["num_bytes"] == 0) == is_kept
    assert files(target) == files(source)
    assert main(["verify", str(target)]) == 0


@pytest.mark.s3
def test_an_upload_that_was_killed_is_not_seen_and_is_written_again(
    tmp_path: Path, s3_server: Any, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, url = tmp_path / "a", f"s3://{bucket}/{uuid.uuid4().hex}"
    save_run(source, PARTS)
    own = [
        f"{name}={s3_server.storage_options[name]}" for name in ("endpoint_url", "key", "secret")
    ]
    options = [word for option in own for word in ("--storage-option", option)]
    kill_copy(["cp", str(source), url, *options], BUFFERS, 18)  # the first part is on its way
    store = open_store(url, storage_options=s3_server.storage_options)
    assert not any("model" in info.key for info in store.list(""))
    assert any("model" in info.key for info in store.unfinished(""))
    assert copy_again(["cp", str(source), url, *options], capsys)["outcome"] == "copied"
    assert main(["verify", url, *options]) == 0
