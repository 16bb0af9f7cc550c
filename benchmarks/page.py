"""``python -m benchmarks.page RUN.json …``: put the figures of runs into the page on performance.

The runs are those that ``python -m benchmarks --json`` wrote; of two with the same figure the later
one counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.goals import judge
from benchmarks.results import figures_in
from benchmarks.samples import Figure

__all__ = ["FIGURES", "PAGE", "figures_of", "rows_of", "rows_on"]

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "performance.md"
FIGURES = PAGE.with_suffix(".json")
_TABLE = re.compile(r"(?<=<!-- figures -->\n).*?(?=\n<!-- end of figures -->)", re.DOTALL)
_OF_CALLS = {
    "time": ".2f",
    "CPU": ".2f",
    "cold": ".2f",
    "peak MiB": ".0f",
    "read": ".2f",
    "written": ".2f",
}
"""Measures that stand in one row: measure → format."""
_LEFT_OUT = ("seconds", "limit seconds", "CPU seconds")
"""Measures that say more of the machine than of a library."""


def figures_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of some runs, and on which machine each was made."""
    shown: dict[tuple[str, ...], Figure] = {}
    for figure in (figure for run in runs for figure in figures_in(run)):
        if figure.measure not in _LEFT_OUT:
            place = (figure.size, figure.operation, figure.library, figure.measure)
            shown[place] = figure
    return {
        "machines": [run["machine"] for run in runs],
        "payload_bytes": {k: v for run in runs for k, v in run["payload_bytes"].items()},
        "figures": [{**asdict(f), "value": round(f.value, 3)} for f in shown.values()],
    }


def rows_of(document: Mapping[str, Any]) -> str:
    """The tables as Markdown: ratios of calls, then all other figures; none without a figure."""
    figures = figures_in(document)
    tables = (_table_of_calls(figures), _table_of_others(figures))
    return "\n\n".join("\n".join(table) for table in tables if table)


def _table_of_calls(figures: Sequence[Figure]) -> list[str]:
    """With a column for each measure that any call has."""
    measured = {figure.measure for figure in figures}
    formats = {measure: form for measure, form in _OF_CALLS.items() if measure in measured}
    rows = list(_rows_of_calls(figures, formats))
    head = f"| size | operation | library | {' | '.join(formats)} | goals |"
    return [head, "|---|---|---|" + "---|" * (len(formats) + 1), *rows] if rows else []


def _table_of_others(figures: Sequence[Figure]) -> list[str]:
    rows = list(_other_rows(figures))
    head = "| size | operation | library | figure | value | goals |"
    return [head, "|---|---|---|---|---|---|", *rows] if rows else []


def _rows_of_calls(figures: Sequence[Figure], formats: Mapping[str, str]) -> Iterator[str]:
    calls = [(f.size, f.operation, f.library) for f in figures if f.measure == "time"]
    for call in sorted(set(calls), key=_order(calls)):
        own = [f for f in figures if (f.size, f.operation, f.library) == call]
        values = {figure.measure: figure.value for figure in own}
        cells = [f"{values[m]:{form}}" if m in values else "" for m, form in formats.items()]
        yield f"| {' | '.join([*call, *cells, _goals(own)])} |"


def _order(calls: Sequence[tuple[str, str, str]]) -> Any:
    """Sizes, operations and libraries in the order of their first call."""
    firsts = [list(dict.fromkeys(names)) for names in zip(*calls, strict=True)]
    return lambda call: [first.index(name) for first, name in zip(firsts, call, strict=True)]


def _other_rows(figures: Sequence[Figure]) -> Iterator[str]:
    calls = {(f.size, f.operation, f.library) for f in figures if f.measure == "time"}
    for f in figures:
        is_shown_above = f.measure in _OF_CALLS or f.measure == "peak"
        if not ((f.size, f.operation, f.library) in calls and is_shown_above):
            place = f"{f.size} | {f.operation} | {f.library}"
            yield f"| {place} | {f.measure} | {f.value:.2f} | {_goals([f])} |"


def _goals(figures: Sequence[Figure]) -> str:
    """Which were met and which missed. Pages are narrow: of the measures only peaks are named."""
    goals: dict[str, list[str]] = {}
    for verdict in judge(figures):
        is_peak = verdict.goal.measure.startswith("peak")
        name = f"{verdict.goal.measure} " if is_peak else ""
        goals.setdefault(verdict.word, []).append(f"{name}{verdict.goal}".replace("≤ ", "≤"))
    return "; ".join(f"{word}: {', '.join(own)}" for word, own in goals.items())


def rows_on(page: str) -> str:
    """The tables that a page holds."""
    found = _TABLE.search(page)
    assert found is not None
    return found[0]


def main() -> None:
    """Write the figures, and the page's tables of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    figures = figures_of([json.loads(path.read_text()) for path in parser.parse_args().runs])
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(_TABLE.sub(lambda _: rows_of(figures), PAGE.read_text()))


if __name__ == "__main__":
    main()
