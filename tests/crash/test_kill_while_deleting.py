"""Real SIGKILLs between any two deletions of a prune: what counts is whole, the rest goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable
from typing import Any

import pytest

from dcp_resume.manager.policies import KeepLast, decide
from dcp_resume.manager.retention import prune
from dcp_resume.session.litter import find_litter, remove_litter
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.sweep import read_needs
from dcp_resume.storage import open_store
from tests.support.built_run import BuiltRun

NUM_FILES = 4
"""Of each checkpoint: three documents and a data file."""
POLICY = KeepLast(1)


class KillingStore:
    """Deletes one key at a time, and kills this process before deletion number ``fatal``."""

    def __init__(self, store: Any, fatal: int) -> None:
        self._store, self._left = store, fatal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._left -= 1
            self._store.delete([key])


def prune_and_die(url: str, options: dict[str, Any], fatal: int) -> None:
    store = KillingStore(open_store(url, storage_options=options), fatal)
    list(prune(store, RunLog(store), POLICY))  # type: ignore[arg-type]


def check(url: str, options: dict[str, Any], fatal: int) -> None:
    """Build a run of three, kill a prune, look at it as a reader, and finish the prune."""
    store = open_store(url, storage_options=options)
    run = BuiltRun(store)
    run.save(10, 20)
    run.save(30, is_incremental=True)  # needs a file of step 20, too
    arguments = json.dumps([url, options, fatal])
    code = f"from {__name__} import prune_and_die; prune_and_die(*{arguments})"
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    history = RunLog(store).refresh()
    found = set(run.attempt_keys())
    for record in history.live_commits().values():
        assert read_needs(store, record) <= found, "a checkpoint that counts is not whole"
    assert len(found) == 3 * NUM_FILES - fatal
    assert history.newest() is not None
    assert len(history.retired) == 1 + (fatal >= NUM_FILES)
    for record in (history.commits[seq] for seq in history.retired):
        half = {key for key in found if key.startswith(f"step-{record.step:08d}/")}
        # The manifest goes first, so nobody takes the rest for a checkpoint.
        assert len(half) == NUM_FILES or record.manifest.key not in half

    log = RunLog(store)
    assert all(one.failure is None for one in prune(store, log, POLICY))
    remove_litter(store, log, find_litter(store, log, until_s=0.0))
    assert [one.is_kept for one in decide(log.refresh(), POLICY)] == [True]
    [newest] = log.history.live_commits().values()
    assert set(run.attempt_keys()) == read_needs(store, newest)
    store.close()


@pytest.mark.parametrize("fatal", range(NUM_FILES + NUM_FILES - 1))
def test_on_a_local_run(tmp_path, fatal):
    check(str(tmp_path / "run"), {}, fatal)


@pytest.mark.s3
@pytest.mark.parametrize("fatal", [0, 2, NUM_FILES + 1])
def test_on_s3(s3_server, bucket, fatal):
    check(f"s3://{bucket}/{uuid.uuid4().hex}", s3_server.storage_options, fatal)
