"""What verbs show on a real terminal: nothing is wider than it, and no word is cut."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import open_store
from tests.support.built_run import BuiltRun
from tests.support.damage import flip

WIDTH = 64


def on_terminal(*words):
    """Exit code, and all that is written to a terminal of ``WIDTH`` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, WIDTH, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dcp_resume", *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**kept, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown = bytearray()
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # how a terminal says that the other side is closed
            break
    os.close(ours)
    return process.wait(), shown.decode()


def lines_of(shown):
    """Lines without colours; what was cleared again is a line of its own."""
    plain = re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", shown)
    return [line for line in re.split(r"[\r\n]+", plain) if line]


def words_of(text):
    return {*re.findall(r"[A-Za-z]{4,}", text)}


def test_views_fit_the_terminal_and_cut_no_word(run, call):
    damaged = next(run.glob("step-00000020/*/shard-*"))
    flip(damaged, damaged.stat().st_size - 1)
    for words in (
        ("verify", run, "--step", "all"),
        ("prune", run, "--keep-last", 1, "--keep-best", "loss:min:2"),
        ("diff", run, run, "--step", 10, "--other-step", 30),
        ("doctor", run, "--size", "40GiB"),
        ("gc", run),
        ("ls", run / "nothing"),
    ):
        code, shown = on_terminal(*words)
        expected, out, err = call(*words)
        assert code == expected, words
        lines = lines_of(shown)
        broken = [line for line in lines if len(line) > WIDTH and " " in line.strip()]
        assert broken == [], words
        assert words_of(out + err) <= words_of(" ".join(lines)), words


def test_a_bar_shows_how_far_a_verb_is_and_is_gone_in_the_end(run):
    code, shown = on_terminal("verify", run)
    bar, *rest = [line for line in lines_of(shown) if line.startswith("verifying")][-1:]
    assert code == 0
    assert rest == []
    assert "━" in bar
    assert re.search(r"100% of .*B, .*/s", bar)
    assert shown.rindex("\x1b[2K") < shown.rindex("whole;")


@pytest.mark.parametrize(
    ("steps", "said"), [((), "has no checkpoint yet"), ((10,), "--all lists the other 1")]
)
def test_ls_says_that_there_is_no_checkpoint(tmp_path, call, steps, said):
    built = BuiltRun(open_store(str(tmp_path)))
    if steps:
        built.save(*steps)
        built.quarantine(10)
    assert RunLog(open_store(str(tmp_path))).refresh().newest() is None
    code, out, _ = call("ls", tmp_path)
    assert code == 0
    assert said in out
    assert out.count("\n") == 1


def test_gc_of_a_clean_run_prints_no_table(run, call):
    assert call("gc", run)[:2] == (0, "0 object(s) would be removed.\n")
