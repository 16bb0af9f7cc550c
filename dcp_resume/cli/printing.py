"""Tables, sizes and JSON, for people and for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

__all__ = [
    "duration_text",
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


def duration_text(duration_s: float) -> str:
    """Seconds for people.

    >>> [duration_text(s) for s in (2.04, 75, 7260, 180000)]
    ['2.0 s', '1 min 15 s', '2 h 01 min', '2 d 2 h']
    """
    if duration_s < 60:
        return f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


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
