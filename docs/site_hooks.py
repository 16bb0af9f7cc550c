"""What the site does with links that leave ``docs/``: on the site they have nowhere to lead."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = r"(?:\.\./)+((?:examples|tests|docker|benchmarks)/\S*?)"
_LINK = re.compile(rf"\[([^\]]+)\]\({_OUTSIDE}\)")
_DEFINITION = re.compile(rf"^\[([^\]]+)\]: {_OUTSIDE}$\n?", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name the file of the repository instead of linking to it."""
    for name, path in _DEFINITION.findall(markdown):
        markdown = re.sub(rf"\[([^\]]+)\]\[{re.escape(name)}\]", rf"\1 (`{path}`)", markdown)
        markdown = markdown.replace(f"[{name}]", f"`{path}`")
    return _LINK.sub(_named, _DEFINITION.sub("", markdown))


def _named(link: re.Match[str]) -> str:
    text, path = link.groups()
    return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"
