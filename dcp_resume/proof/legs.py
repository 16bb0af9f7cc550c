"""Run one training of a proof to its end: a command of any number of processes."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dcp_resume.errors import LegFailed

__all__ = ["Leg", "run_leg"]

TAIL_LINES = 25
GRACE_S = 40.0
"""For a group that was told to end. A torchrun gives its ranks 30 s of it."""
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Leg:
    """One training."""

    name: str
    words: tuple[str, ...]
    """The command."""
    run: str
    """URL of the run that it saves to."""
    stop: int
    """Step at which it is to end."""
    output: Path
    """File for what it says."""

    def failed(self, what: str, remedy: str, returncode: int = 0) -> LegFailed:
        """The error for a leg that did not do its part.

        Args:
            what: What it did, after ``leg '…'``.
            remedy: What to do.
            returncode: Exit status of the command.
        """
        said = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(f"  | {line}" for line in said[-TAIL_LINES:]) or "  | (nothing)"
        return LegFailed(
            f"leg {self.name!r} {what}:\n  $ {shlex.join(self.words)}\nthe end of what it said, "
            f"all of which is in {self.output}:\n{tail}\n{remedy}",
            leg=self.name,
            returncode=returncode,
            output=str(self.output),
        )


def run_leg(leg: Leg) -> None:
    """Run a leg to its end; if this is interrupted, the leg's processes end first.

    Raises:
        LegFailed: The command cannot be started, or did not end well.
    """
    with leg.output.open("wb") as lines, _group(leg, lines) as process:
        returncode = process.wait()
    if returncode:
        how = f"ended with {returncode}"
        if returncode < 0:
            how = f"was ended by {signal.Signals(-returncode).name}"
        raise leg.failed(how, "run it by hand until it works, then prove again", returncode)


@contextlib.contextmanager
def _group(leg: Leg, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(
            leg.words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a Ctrl-C reaches its processes once, and in order: by us
        )
    except OSError as error:
        raise leg.failed(f"cannot be started ({error})", "check the command", 127) from error
    try:
        yield process
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group: asked first, then killed, at once if interrupted again."""
    deadline = time.monotonic() + GRACE_S
    try:
        # A torchrun starts its ranks in sessions of their own, and ends them when it is told to.
        _signal(process.pid, signal.SIGTERM)
        while _signal(process.pid, 0) and time.monotonic() < deadline:
            process.poll()  # reaps it: a zombie would still be of the group
            time.sleep(_POLL_S)
    finally:
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(group: int, number: int) -> bool:
    """Send a signal to a process group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
