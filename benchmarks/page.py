"""``python -m benchmarks.page RUN.json …``: put medians into the page on performance.

The runs are those that ``python -m benchmarks --json`` wrote, one a size.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FIGURES", "PAGE", "figures_of", "rows_of", "rows_on"]

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "performance.md"
FIGURES = PAGE.with_suffix(".json")
_TABLE = re.compile(r"(?<=<!-- figures -->\n).*?(?=\n<!-- end of figures -->)", re.DOTALL)

Figures = dict[str, dict[str, Any]]
"""Size → the machine's facts, and ``figures``: operation → library → ratios to the raw limit."""


def figures_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of one run, without its cold repetition."""
    samples = [sample for sample in run["samples"] if sample["repetition"]]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for operation, library in dict.fromkeys((s["operation"], s["library"]) for s in samples):
        own = [s for s in samples if (s["operation"], s["library"]) == (operation, library)]
        found.setdefault(operation, {})[library] = {
            "time": _median(s["cost"]["seconds"] / s["limit"]["seconds"] for s in own),
            "cpu": _median(s["cost"]["cpu_seconds"] / s["limit"]["cpu_seconds"] for s in own),
        }
    facts = {key: run[key] for key in ("payload_bytes", "torch", "cores", "load_average")}
    return {**facts, "figures": found}


def _median(ratios: Iterable[float]) -> float:
    return round(statistics.median(ratios), 2)


def rows_of(figures: Figures) -> str:
    """The table as Markdown."""
    lines = ["| size | operation | library | time | CPU |", "|---|---|---|---|---|"]
    for size, run in figures.items():
        for operation, libraries in run["figures"].items():
            for library, ratio in libraries.items():
                cells = f"{ratio['time']:.2f} | {ratio['cpu']:.2f}"
                lines.append(f"| {size} | {operation} | {library} | {cells} |")
    return "\n".join(lines)


def rows_on(page: str) -> str:
    """The table that a page holds."""
    found = _TABLE.search(page)
    assert found is not None
    return found[0]


def main() -> None:
    """Write the figures, and the page's table of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    runs = [json.loads(path.read_text()) for path in parser.parse_args().runs]
    figures = {run["size"]: figures_of(run) for run in runs}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    PAGE.write_text(_TABLE.sub(lambda _: rows_of(figures), PAGE.read_text()))


if __name__ == "__main__":
    main()
