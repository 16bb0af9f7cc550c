"""The pages beside the documentation: links lead somewhere, and the verbs they name exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), ROOT / "docker/README.md", ROOT / "docs/tutorial/first-resume.md"]
)


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text())
    inside = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in inside if not (page.parent / link).exists()] == []


def test_make_verbs_exist(page):
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|\$ )make ([a-z0-9-]+)", page.read_text()))
    assert named <= verbs


def test_pictures_are_those_that_the_script_draws_and_pages_show_each():
    views = runpy.run_path(str(ROOT / "docs" / "views.py"))
    drawn = {f"{name}.svg" for name in views["VIEWS"]} | {"report.png"}
    assert {path.name for path in views["PLACE"].iterdir()} == drawn
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert {*re.findall(r"\(images/([\w.-]+)\)", pages)} == drawn
    for name, call in views["VIEWS"].items():
        picture = (views["PLACE"] / f"{name}.svg").read_text(encoding="utf-8")
        assert not re.search(r"url\(http|@import|<image", picture), name
        assert call.split()[0] in picture
