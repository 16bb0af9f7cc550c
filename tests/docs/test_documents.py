"""The documents keep their word: links lead somewhere, commands exist, Python blocks run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*.md")])
RUNNABLE = [ROOT / "README.md", ROOT / "docs/tutorial/first-resume.md"]
"""Pages whose Python blocks are run, one session a page."""


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """The page without its fenced blocks, in which a bracket is no link."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue  # outside of this repository
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_broken = not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        )
        if is_broken:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_verbs_exist(page):
    verbs = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z0-9-]+)", page.read_text(), re.MULTILINE))
    assert named <= verbs


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, name(page), "exec"), session)  # the block is ours
