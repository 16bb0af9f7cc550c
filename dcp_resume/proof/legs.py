"""Run one training of a proof to its end: a command of any number of processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
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
    """Run a leg to its end; call it in the main thread.

    SIGINT and SIGTERM end the leg's processes, and then raise ``KeyboardInterrupt``.

    Raises:
        LegFailed: The command cannot be started, or did not end well.
    """
    with leg.output.open("wb") as lines, _Interruptions() as interruptions:
        process = _start(leg, lines)
        try:
            interruptions.let_through()
            returncode = process.wait()
        finally:
            if process.poll() is None:
                _end(process)
    if returncode:
        how = f"ended with {returncode}"
        if returncode < 0:
            how = f"was ended by {signal.Signals(-returncode).name}"
        raise leg.failed(how, "run it by hand until it works, then prove again", returncode)


class _Interruptions:
    """SIGINT and SIGTERM, kept back until the process that they shall end is known.

    Without it, one that comes while the process is being started would leave that behind.
    """

    def __enter__(self) -> _Interruptions:
        self._are_let_through = self._is_pending = False
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def let_through(self) -> None:
        """From now on raise at once; also what came before."""
        self._are_let_through = True
        if self._is_pending:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._is_pending = True
        if self._are_let_through:
            raise KeyboardInterrupt


def _start(leg: Leg, output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            leg.words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # a Ctrl-C reaches its processes once, and in order: by us
        )
    except OSError as error:
        raise leg.failed(f"cannot be started ({error})", "check the command", 127) from error


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
