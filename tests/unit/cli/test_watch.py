"""``watch``: a run's log as it grows, in a process of its own."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from contextlib import contextmanager

from dcp_resume.cli.printing import duration_text
from tests.support.saved_run import save_steps


@contextmanager
def watching(run, *words, **streams):
    command = [sys.executable, "-m", "dcp_resume", "watch", str(run), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


def end(process):
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    return process.stdout.read()


def test_each_record_is_a_line_of_json_as_it_comes(run, call):
    with watching(run, "--json", "--interval", "0.1s", stderr=subprocess.PIPE) as process:
        before = [json.loads(process.stdout.readline()) for _ in range(4)]
        call("pin", run, "--step", 20, "--label", "paper")
        pinned = json.loads(process.stdout.readline())
        save_steps(run, [25], resume=20)
        after = [json.loads(process.stdout.readline()) for _ in range(2)]
        assert end(process) == ""
        assert process.stderr.read() == "dcp-resume: interrupted\n"
    assert [(r["kind"], r["step"]) for r in before] == [
        ("open", None),
        ("commit", 10),
        ("commit", 20),
        ("commit", 30),
    ]
    assert (pinned["kind"], pinned["step"], pinned["label"]) == ("pin", 20, "paper")
    assert [(r["kind"], r["step"]) for r in after] == [("open", 20), ("commit", 25)]
    assert [r["seq"] for r in (*before, pinned, *after)] == [1, 2, 3, 4, 5, 6, 7]


def test_every_kind_of_record_has_its_words(run, call):
    call("pin", run, "--step", 20)
    call("unpin", run, "--step", 20)
    call("tag", run, "good", "--step", 20)
    call("tag", run, "good", "--delete")
    call("quarantine", run, 30, "--reason", "disk 3")
    call("unquarantine", run, 30)
    call("prune", run, "--keep-last", 2, "--yes")
    with watching(run, "--interval", "0.1s", stderr=subprocess.DEVNULL) as process:
        lines = [process.stdout.readline().split(maxsplit=1)[1].split() for _ in range(10)]
        end(process)
    assert [" ".join(line) for line in lines] == [
        "saved step 10, 1.6 KiB, loss 10",
        "saved step 20, 1.6 KiB, loss 5",
        "saved step 30, 1.6 KiB, loss 3.333",
        "pinned step 20",
        "unpinned step 20",
        "tagged step 20 as good",
        "untagged good",
        "quarantined step 30: disk 3",
        "restored step 30",
        "retired step 10: retention: last 2",
    ]


def test_a_terminal_shows_the_newest_step_its_age_and_the_rate(run):
    terminal, inner = pty.openpty()
    with watching(run, "--interval", "0.1s", stderr=inner) as process:
        os.close(inner)
        shown = b""
        while b"saves every" not in shown:
            shown += os.read(terminal, 1000)
        end(process)
    os.close(terminal)
    assert b"generation 1, newest step 30, " in shown


def test_durations_for_people():
    assert duration_text(59.94) == "59.9 s"
    assert [duration_text(s) for s in (60, 3600, 86_400)] == ["1 min 00 s", "1 h 00 min", "1 d 0 h"]
