"""The table of the how-to says what tests show, and nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "import-and-export.md"


def test_each_row_of_the_table_has_its_test():
    rows = re.findall(r"^\|[^|]+\| (?:in|out|both) \|[^|]+\| (\w+) \|$", PAGE.read_text(), re.M)
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    tests = {n.name for t in trees for n in t.body if isinstance(n, ast.FunctionDef)}
    assert len(rows) > 10
    assert set(rows) <= tests
    peers = {n for n in tests if re.search(r"_to_us|^test_us_to_", n)}
    assert peers <= set(rows)
