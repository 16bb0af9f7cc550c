"""The page on performance shows the measured figures, and no others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from benchmarks.page import FIGURES, PAGE, figures_of, rows_of, rows_on
from benchmarks.samples import Figure

TIME = Figure("byte-bound", "load", "dcp_resume", "time", 1.5)
COLD = replace(TIME, measure="cold", value=3.0)
SPEED = Figure("training", "alone", "dcp_resume", "step speed", 0.97)


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ([TIME], "| size | operation | library | time | goals |"),
        ([TIME, COLD], "| size | operation | library | time | cold | goals |"),
        ([SPEED], "| size | operation | library | figure | value | goals |"),
    ],
)
def test_no_column_and_no_table_is_without_a_figure(figures, shown):
    rows = rows_of({"figures": [asdict(figure) for figure in figures]})
    assert [line for line in rows.splitlines() if line.startswith("| size")] == [shown]


def test_cold_calls_are_shown():
    figures = figures_of([{"machine": {}, "payload_bytes": {}, "figures": [asdict(COLD)]}])
    assert [figure["measure"] for figure in figures["figures"]] == ["cold"]


def test_the_table_holds_the_measured_figures():
    assert rows_on(PAGE.read_text()) == rows_of(json.loads(FIGURES.read_text()))
