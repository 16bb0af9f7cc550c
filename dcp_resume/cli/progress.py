"""What stderr shows while a verb works: how far it is, and that storage is tried again."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dcp_resume.cli.printing import print_prose, size_text
from dcp_resume.events import Event, StorageRetried

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ProgressLine", "RetryNotes", "StatusLine"]


class RetryNotes:
    """Says on stderr that storage is tried again, so that nobody waits in the dark.

    Args:
        clock: Monotonic seconds.
    """

    _EVERY_S = 5.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = -math.inf

    def __call__(self, event: Event) -> None:
        """Say so at the first retry, and every few seconds."""
        if not isinstance(event, StorageRetried) or self._clock() < self._next:
            return
        self._next = self._clock() + self._EVERY_S
        what = f"{event.key!r}: " if event.key else ""
        note = f"dcp-resume: storage is tried again, {what}{event.reason}"
        StatusLine().close()  # else the note goes on where the status ends
        print_prose(note, sys.stderr)


class StatusLine:
    """One line on the terminal that changes; nothing where stderr is no terminal."""

    def __init__(self) -> None:
        self.is_shown = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Show a text instead of the one before."""
        if self.is_shown:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text[:width]}\x1b[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self.is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class ProgressLine:
    """How far a verb is: a bar where rich is installed, else a line; only on a terminal."""

    _EVERY_S = 0.2

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._line = StatusLine()
        self._started = time.monotonic()
        self._next = 0.0
        self._bar = _bar(verb) if self._line.is_shown else None

    def __call__(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` bytes are done."""
        now = time.monotonic()
        if not self._line.is_shown or (now < self._next and done < total):
            return
        self._next = now + self._EVERY_S
        rate = size_text(done / max(now - self._started, 1e-9))
        text = f"{100 * done / max(total, 1):3.0f}% of {size_text(total)}, {rate}/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)
        else:
            self._line.show(f"{self._verb} {text}")

    def close(self) -> None:
        """Clear it."""
        if self._bar is not None:
            self._bar.stop()
        else:
            self._line.close()


def _bar(verb: str) -> Progress | None:
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )
    bar.add_task(verb, total=None, text="")
    bar.start()
    return bar
