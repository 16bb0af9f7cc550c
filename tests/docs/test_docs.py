"""The pages are true: their Python runs, their links lead somewhere, their tables are whole.

A fenced ``python`` block runs, one session a page, or its fence says why not:

    ```python no-run="needs an S3 server"
"""

from __future__ import annotations

import dataclasses
import linecache
import logging
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import dcp_resume
from dcp_resume import errors, events

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.exists()
}
OTHER_LANGUAGES = {"text", "sh", "bash", "shell", "console", "json", "yaml", "toml", "ini"}
OTHER_LANGUAGES |= {"dockerfile", "make", "mermaid", "diff"}
_NOT_RUN = re.compile(r'python no-run="[^"]{8,}"')
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_NAMES = re.compile(r"`(\w+)`")


class Block(NamedTuple):
    info: str
    line: int
    """Of its first line of code, from 1."""
    code: str


def blocks_of(text: str) -> Iterator[Block]:
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.lstrip().startswith("```"):
            indent = len(line) - len(line.lstrip())
            code: list[str] = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                code.append(inner[indent:])
            yield Block(line.strip().removeprefix("```").strip(), number + 1, "\n".join(code))


def prose_of(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """What the headings are called in links."""
    titles = re.findall(r"^#+ (.+)$", prose_of(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def section_of(page: str, title: str) -> str:
    parts = re.split(r"^## (\w+)\n", PAGES[page], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def titles_of(page: str) -> set[str]:
    return set(re.findall(r"^## (\w+)$", PAGES[page], flags=re.MULTILINE))


def line_of(section: str, label: str) -> str:
    """The text behind a label, up to the next item or paragraph."""
    found = re.search(rf"^- {label}: (.+?)(?=^- |\n\n|\Z)", section, re.MULTILINE | re.DOTALL)
    assert found, f"no line {label!r}"
    return found[1].strip()


def rows_of(section: str) -> dict[str, list[str]]:
    """First cell in backquotes → the other cells."""
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", section, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


# Code.


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs_or_says_why_not(page):
    for block in blocks_of(PAGES[page]):
        is_known = block.info == "python" or block.info in OTHER_LANGUAGES
        assert is_known or _NOT_RUN.fullmatch(block.info), f"{page}:{block.line - 1}: {block.info}"


@pytest.mark.parametrize("page", [p for p, t in PAGES.items() if "\n```python\n" in t])
def test_python_blocks_run(page, tmp_path, monkeypatch):
    from dcp_resume.session.incarnation import forget_incarnations

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(events, "_subscribers", [])  # those of a page end with it
    session: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in blocks_of(PAGES[page]):
            if block.info == "python":
                name = f"<{page}:{block.line}>"
                lines = [line + "\n" for line in block.code.splitlines()]
                linecache.cache[name] = (len(block.code), None, lines, name)
                exec(compile(block.code, name, "exec"), session)
    finally:
        forget_incarnations()


@pytest.mark.parametrize("page", [p for p, t in PAGES.items() if 'no-run="' in t])
def test_blocks_that_are_not_run_are_python_at_least(page):
    for block in blocks_of(PAGES[page]):
        if block.info.startswith("python "):
            compile(block.code, f"{page}:{block.line}", "exec")


# Pages.


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = []
    for target in _LINK.findall(prose_of(PAGES[page])):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" and path.exists() else ""
        if not path.exists() or (anchor and anchor not in anchors_of(text)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_pages_are_narrow_and_name_no_machine(page):
    lines = PAGES[page].splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 110] == []
    assert re.findall(r"(?:/work|/tmp/venv|/root)/\S*", PAGES[page]) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_pages_begin_with_a_title_and_a_sentence(page):
    title, _, sentence = PAGES[page].partition("\n\n")
    assert title.startswith("# ")
    assert re.match(r"[A-Z]", sentence)


def test_the_index_names_every_page():
    linked = {
        str(((ROOT / "docs") / target.partition("#")[0]).resolve().relative_to(ROOT))
        for target in _LINK.findall(PAGES["docs/index.md"])
    }
    assert {page for page in PAGES if page.startswith("docs/")} - linked == {"docs/index.md"}


def test_decisions_have_their_four_sections_and_fit_a_page():
    decisions = {page: text for page, text in PAGES.items() if "/decisions/" in page}
    for page, text in decisions.items():
        titles = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
        assert titles == ["Context", "Decision", "Consequences", "Status"], page
        assert len(text.splitlines()) <= 40, page


def test_39_a_page_compares_our_format_with_those_of_torch_dcp_and_megatron():
    """Row by row; that others read ours, the last one, tests/ranks/test_stock_readers.py shows."""
    text = PAGES["docs/explanation/comparison.md"]
    names, _, *rows = re.findall(r"^\|(.+)\|$", text, flags=re.MULTILINE)
    ours, *others = [name.strip() for name in names.split("|")][1:]
    assert ours == "dcp_resume"
    assert {"torch.save", "DCP", "Megatron torch_dist"} <= set(others)
    assert "other readers" in rows[-1]
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == 2 + len(others), row
        assert all(cells), row
    for other in others:
        assert f"**{other}**" in text, f"nothing is said of {other} beside the table"


# References.

ERRORS = "docs/reference/errors.md"
EVENTS = "docs/reference/events.md"
OPTIONS = "docs/reference/options.md"


def test_errors_page_has_every_class():
    assert set(errors.__all__) <= titles_of(ERRORS)
    assert titles_of(ERRORS) == set(errors.__all__)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "Problem"])
def test_error_section(name):
    kind, section = getattr(errors, name), section_of(ERRORS, name)
    assert _NAMES.findall(line_of(section, "Is a")) == [base.__name__ for base in kind.__bases__]
    assert _NAMES.findall(line_of(section, "Attributes")) == list(kind.fact_names())
    assert line_of(section, "Cause").endswith(".")
    assert line_of(section, "Remedy").endswith(".")


def test_problem_section():
    names = _NAMES.findall(line_of(section_of(ERRORS, "Problem"), "Attributes"))
    assert names == [field.name for field in dataclasses.fields(errors.Problem)]


def test_events_page_has_every_name():
    assert titles_of(EVENTS) == set(events.__all__)


@pytest.mark.parametrize("name", [name for name in events.__all__ if name[0].isupper()])
def test_event_section(name):
    names = _NAMES.findall(line_of(section_of(EVENTS, name), "Fields"))
    assert names == [field.name for field in dataclasses.fields(getattr(events, name))]


def test_events_page_names_the_level_of_each_that_is_logged_above_debug():
    _, _, page = PAGES[EVENTS].partition("| level | events |\n|---|---|\n")
    rows = re.findall(r"^\| `([A-Z]+)` \| (`.+) \|$", page, flags=re.MULTILINE)
    named = {name: level for level, names in rows for name in _NAMES.findall(names)}
    kinds = [kind for kind in vars(events).values() if isinstance(kind, type)]
    of_events = [kind for kind in kinds if issubclass(kind, events.Event)]
    assert named == {
        kind.__name__: logging.getLevelName(kind.level)
        for kind in of_events
        if kind.level > logging.DEBUG
    }


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return f"{type(made).__name__}()" if dataclasses.is_dataclass(made) else repr(made)
    return str(field.default) if isinstance(field.default, Enum) else repr(field.default)


@pytest.mark.parametrize(
    "name",
    ["Settings", "PreemptionSettings", "LoadOptions", "Declarations", "Signing", "RetryPolicy"],
)
def test_options_section(name):
    fields = [f for f in dataclasses.fields(getattr(dcp_resume, name)) if f.compare]
    rows = rows_of(section_of(OPTIONS, name))
    assert list(rows) == [field.name for field in fields]
    for field in fields:
        default, unit, meaning = rows[field.name]
        assert default == f"`{default_of(field)}`", field.name
        assert unit == ("s" if field.name.endswith("_s") else unit), field.name
        assert meaning, field.name


@pytest.mark.parametrize(
    "name",
    ["OptimizerState", "SaveMode", "WhenBusy", "WhenShort", "Strictness", "Apply", "Severity"],
)
def test_members_section(name):
    members = [member.name for member in getattr(dcp_resume, name)]
    assert sorted(rows_of(section_of(OPTIONS, name))) == sorted(members)
