"""The table and the JSON of what was found."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import GOALS, judge
from benchmarks.samples import Figure, Findings

__all__ = ["figures_in", "table", "write_json"]

_COLUMNS = {
    "time": ("x raw", ".2f"),
    "CPU": ("x raw cpu", ".2f"),
    "cold": ("cold", ".1f"),
    "seconds": ("s", ".3f"),
    "limit seconds": ("raw s", ".3f"),
    "CPU seconds": ("cpu s", ".2f"),
    "peak MiB": ("peak MiB", ".0f"),
    "read": ("read x", ".2f"),
    "written": ("wrote x", ".2f"),
}
"""Of a table of calls: measure → heading, format."""


def table(findings: Findings) -> str:
    """The figures of one subject and payload, with the goals that they meet or miss."""
    lines = [f"\n{findings.subject}: {findings.size}, {findings.ranks} ranks"]
    if findings.samples:
        headings = " ".join(f"{heading:>9}" for heading, _ in _COLUMNS.values())
        lines += [
            f"payload {findings.payload_bytes / 2**20:.0f} MiB; x raw: ratio to the limit probed "
            "beside it; cold: the first of its kind; peak: of the largest rank",
            f"{'':16} {'':22} {headings}",
        ]
    of_calls = [figure for figure in findings.figures() if figure not in findings.others]
    for operation, library, _ in findings.by_call():
        row = [f for f in of_calls if (f.operation, f.library) == (operation, library)]
        by_measure = {figure.measure: figure.value for figure in row}
        cells = " ".join(f"{by_measure[m]:9{form}}" for m, (_, form) in _COLUMNS.items())
        lines.append(f"{operation:16} {library:22} {cells}  {_verdicts(row)}".rstrip())
    for one in findings.others:
        own = f"{one.operation:26} {one.library:22} {one.value:9.2f} {one.measure}"
        lines.append(f"{own}  {_verdicts([one])}".rstrip())
    for library, reason in findings.failures.items():
        lines.append(f"{library} failed: {reason}")
    return "\n".join(lines)


def _verdicts(figures: Sequence[Figure]) -> str:
    """Of every goal on these figures."""
    return ", ".join(
        f"{verdict.goal.measure} {verdict.value:.2f} {verdict.goal} {verdict.word}"
        for verdict in judge(figures)
    )


def write_json(path: Path, findings: Sequence[Findings], directory: Path) -> None:
    """Every sample and figure, the goals, and where it was measured.

    Args:
        path: Of the document.
        findings: Of all subjects.
        directory: The storage that was measured.
    """
    found = [figure for one in findings for figure in one.figures()]
    document = {
        "machine": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_average": [round(load, 2) for load in os.getloadavg()],
            "directory": os.fspath(directory),
        },
        "payload_bytes": {one.size: one.payload_bytes for one in findings if one.payload_bytes},
        "figures": [asdict(figure) for figure in found],
        "goals": [
            {**asdict(v.goal), "sense": v.goal.sense.value, "value": v.value, "is": v.word}
            for v in judge(found)
        ],
        "goals_not_measured": [
            f"{goal.size}: {goal.operation}, {goal.measure}"
            for goal in GOALS
            if not any(map(goal.is_of, found))
        ],
        "failures": {f"{one.subject} {one.size}": one.failures for one in findings if one.failures},
        "samples": [
            {"subject": one.subject, "size": one.size, **asdict(sample)}
            for one in findings
            for sample in one.samples
        ],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def figures_in(document: Mapping[str, Any]) -> list[Figure]:
    """The figures that ``write_json`` wrote."""
    return [Figure(**figure) for figure in document["figures"]]
