"""The running save on the terminal of rank 0."""

from __future__ import annotations

import os
import sys
import threading
from typing import TextIO

from dcp_resume.events import Event, FileWritten, PhaseFinished, SaveAdvanced, SaveFailed

__all__ = ["SaveProgress"]

_WIDTH = 24


class SaveProgress:
    """A subscriber that draws how far this rank's save is; nothing on other ranks or in a file.

        step 400  ━━━━━━━━━━━━╸━━━━━━━━━━━  52 %  1.1 of 2.1 GB  written

    Plain text, so that it stands among what the trainer prints, and rich may own the screen.

    Args:
        rank: Of this process; by default ``RANK`` of the environment. Only rank 0 draws.
        stream: Where to; by default stderr.
    """

    def __init__(self, rank: int | None = None, stream: TextIO | None = None) -> None:
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self._stream = stream or sys.stderr
        self._is_shown = rank == 0 and self._stream.isatty()
        self._lock = threading.Lock()
        self._step = 0
        self._total = 0
        self._done = 0

    def __call__(self, event: Event) -> None:
        """Draw, if the event moved the save."""
        if not self._is_shown:
            return
        with self._lock:
            match event:
                case SaveAdvanced(milestone="planned"):
                    self._step, self._total, self._done = event.step, 0, 0
                    self._draw("planned")
                case SaveAdvanced(milestone="committed"):
                    self._end(f"step {event.step} committed after {event.elapsed_s:.1f} s")
                case SaveAdvanced():
                    self._draw(event.milestone)
                case PhaseFinished(phase="stage"):
                    self._total = event.num_bytes
                case FileWritten():
                    self._done += event.num_bytes
                    self._draw("writing")
                case SaveFailed():
                    self._end(f"step {event.step} was not saved: {event.reason}")

    def _draw(self, word: str) -> None:
        share = min(1.0, self._done / self._total) if self._total else 0.0
        full = int(share * _WIDTH)
        bar = "━" * full + "─" * (_WIDTH - full)
        size = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        line = f"\rstep {self._step}  {bar}  {100 * share:3.0f} %  {size}  {word}\x1b[K"
        self._stream.write(line)
        self._stream.flush()

    def _end(self, text: str) -> None:
        self._stream.write(f"\r{text}\x1b[K\n")
        self._stream.flush()
