"""The page on performance shows the measured figures, and no others."""

from __future__ import annotations

import json

from benchmarks.page import FIGURES, PAGE, rows_of, rows_on


def test_the_table_holds_the_measured_figures():
    assert rows_on(PAGE.read_text()) == rows_of(json.loads(FIGURES.read_text()))
