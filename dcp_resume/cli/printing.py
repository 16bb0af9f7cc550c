"""Tables, sizes, JSON and progress, for people and for programs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dcp_resume.events import Event, StorageRetried

__all__ = [
    "ProgressLine",
    "RetryNotes",
    "print_json",
    "print_table",
    "size_text",
    "without_infinities",
]

_MAX_RICH_ROWS = 200
"""Rich needs half a second for a thousand rows, and nobody admires so many."""


def size_text(num_bytes: float) -> str:
    """Bytes for people.

    >>> size_text(1536)
    '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def without_infinities(value: Any) -> Any:
    """The same JSON with null for each number that standard JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    return value


def print_json(document: Any) -> None:
    """Print one document; infinities and NaN become null."""
    print(json.dumps(without_infinities(document), indent=2, allow_nan=False, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 0) -> None:
    """Print rows under their headings: by rich on a terminal where it is installed, else plainly.

    Args:
        columns: Headings.
        rows: Cells.
        left: The first so many columns are aligned to the left, the others to the right.
    """
    if _is_terminal() and len(rows) <= _MAX_RICH_ROWS and _print_rich(columns, rows, left):
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _print_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        justify: Any = "left" if number < left else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
    return True


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
        print(note, file=sys.stderr, flush=True)


class ProgressLine:
    """One line on the terminal that says how far it is; nothing where stderr is no terminal."""

    _EVERY_S = 0.2

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._is_shown = sys.stderr.isatty()
        self._started = time.monotonic()
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` bytes are done."""
        now = time.monotonic()
        if not self._is_shown or (now < self._next and done < total):
            return
        self._next = now + self._EVERY_S
        rate = size_text(done / max(now - self._started, 1e-9))
        share = f"{100 * done / max(total, 1):3.0f}%"
        line = f"\r{self._verb} {share} of {size_text(total)}, {rate}/s\x1b[K"
        print(line, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
