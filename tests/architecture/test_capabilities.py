"""Every capability on the list has a test that bears its number, and its line on the page."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "capabilities.md"
NUMBERS = range(1, 55)


def collected(tree: ast.Module) -> set[str]:
    """Names of the test functions that pytest collects from a module."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.startswith("Test")]
    bodies = [tree.body, *(node.body for node in classes)]
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if node.name.startswith("test_")}


def numbered_tests() -> dict[int, set[str]]:
    """Number → the files with tests whose names begin with it."""
    files: dict[int, set[str]] = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name in collected(ast.parse(path.read_text())):
            [numbers] = re.findall(r"^test((?:_\d\d)*)(?:_|$)", name)
            for number in re.findall(r"\d\d", numbers):
                files[int(number)].add(path.relative_to(ROOT).as_posix())
    return dict(files)


def listed() -> dict[int, set[str]]:
    """Number → the files to which its line on the page leads."""
    text = PAGE.read_text()
    files = dict(re.findall(r"^\[([^]]+)\]: \.\./\.\./(\S+)$", text, flags=re.MULTILINE))
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", text, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(NUMBERS), "one line a number, in order"
    names = {int(number): re.findall(r"\[([^]]+)\]", cell) for number, cell in rows}
    return {number: {files[name] for name in cell} for number, cell in names.items()}


TESTED = numbered_tests()


@pytest.mark.parametrize("number", NUMBERS)
def test_each_capability_has_a_test_that_bears_its_number(number):
    assert TESTED.get(number), f"no test is named test_{number:02}_…"


def test_no_test_bears_a_number_that_is_not_on_the_list():
    assert set(TESTED) <= set(NUMBERS)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_page_leads_from_each_number_to_files_with_its_tests(number):
    assert listed()[number] <= TESTED.get(number, set())
    assert bool(listed()[number]) == (number in TESTED), "the page leads nowhere"
