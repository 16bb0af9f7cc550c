"""The page of faults names exactly the faults that the tests show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults import test_disk, test_s3

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "faults.md"
TABLES = {
    "test_a_save_outlives": test_s3.PASSING,
    "test_a_save_fails_typed_and_training_goes_on": test_s3.FAILING,
    "test_a_save_in_parts": test_s3.PARTS,
    "test_a_resume_outlives": test_s3.LOADS,
    "test_a_store_that_fails_is_never_a_reason_to_fall_back": test_s3.DOWN,
    "test_a_broken_disk_fails_the_save_and_training_goes_on": test_disk.BROKEN,
    "test_a_commit_is_unknown_until_the_disk_says_yes": test_disk.UNKNOWN,
}
SECTIONS = dict(
    re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)


def test_every_section_is_a_test():
    assert set(SECTIONS) == set(TABLES)
    for name in SECTIONS:
        assert hasattr(test_s3, name) or hasattr(test_disk, name)


@pytest.mark.parametrize("name", TABLES)
def test_every_fault_has_its_row(name):
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \|", SECTIONS[name], re.MULTILINE)
    assert [fault for fault, _ in rows] == list(TABLES[name])
    kinds = {fault: case[-1].__name__ for fault, case in TABLES[name].items() if is_error(case[-1])}
    for fault, outcome in rows:
        assert fault not in kinds or f"`{kinds[fault]}`" in outcome


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)
