"""The command line while storage fails for a time."""

from __future__ import annotations

import io
import sys
import uuid

import pytest
import torch

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.cli.main import main
from dcp_resume.cli.progress import RetryNotes, StatusLine
from dcp_resume.events import StorageRetried
from tests.support.fault_proxy import Fault, FaultProxy


@pytest.mark.s3
def test_retries_are_said_on_stderr(s3_server, capsys):
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    url = f"s3://{bucket}/run"
    settings = Settings(mode=SaveMode.BLOCKING, storage_options=s3_server.storage_options)
    with CheckpointManager(url, settings) as checkpoints:
        checkpoints.save(1, {"model": {"w": torch.ones(2)}})

    with FaultProxy(s3_server.endpoint) as proxy:
        proxy.inject("GET", "log", Fault.SLOW_DOWN, times=2)
        options = s3_server.storage_options_at(proxy.endpoint)
        words = [f"{k}={v}" for k, v in options.items() if isinstance(v, str)]
        code = main(["ls", url, *(w for word in words for w in ("--storage-option", word))])

    out, err = capsys.readouterr()
    assert code == 0
    assert len(out.splitlines()) == 2
    assert err.startswith("dcp-resume: storage is tried again, 'log/")
    assert "SlowDown" in err


def test_notes_come_at_once_and_then_now_and_then(capsys):
    now = [0.0]
    note = RetryNotes(lambda: now[0])
    for second in range(12):
        now[0] = float(second)
        note(StorageRetried(key="k", attempt=1, delay_s=0.1, reason=f"503 at {second}"))

    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ["0", "5", "10"]


def test_a_note_on_a_terminal_does_not_go_on_where_a_status_ends(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    StatusLine().show("generation 1, newest step 40")
    RetryNotes()(StorageRetried(key="log/", reason="it is away", delay_s=1.0, attempt=1))
    *_, cleared, note = shown.getvalue().split("\r")
    assert note == "\x1b[Kdcp-resume: storage is tried again, 'log/': it is away\n"
    assert cleared.startswith("generation 1")
