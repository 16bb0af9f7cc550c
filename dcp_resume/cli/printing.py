"""Tables, sizes and JSON, for people and for programs."""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Collection, Sequence
from typing import Any, TextIO

__all__ = [
    "duration_text",
    "print_json",
    "print_prose",
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


def print_prose(text: str, to: TextIO | None = None) -> None:
    """Print sentences or items, one a line: on a terminal broken between words, else as they are.

    What goes on in the next line stands two further in than the first.

    Args:
        text: One or more lines.
        to: Where; stdout by default.
    """
    stream = sys.stdout if to is None else to
    lines = text.splitlines()
    if _is_terminal(stream):
        width = shutil.get_terminal_size().columns
        lines = [part for line in lines for part in _wrapped(line, width)]
    print("\n".join(lines), file=stream, flush=True)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty()


def _wrapped(line: str, width: int) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[str] = ()
) -> None:
    """Print rows under their headings: by rich on a terminal where it is installed, else plainly.

    Args:
        columns: Headings.
        rows: Cells.
        words: Columns that are aligned to the left; the others, numbers, to the right.
    """
    if (
        _is_terminal(sys.stdout)
        and len(rows) <= _MAX_RICH_ROWS
        and _print_rich(columns, rows, words)
    ):
        return
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _print_rich(
    columns: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[str]
) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify: Any = "left" if column in words else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
    return True
