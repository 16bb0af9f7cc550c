"""The JSON file of ``--layout``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_resume.errors import ConfigurationError

if TYPE_CHECKING:
    from dcp_resume.planning.layout_rules import LayoutRules

__all__ = ["read_layout"]


def read_layout(path: str | None) -> LayoutRules:
    """Read the rules of a file; none without one.

    Raises:
        ConfigurationError: It cannot be read, or is no layout.
    """
    from dcp_resume.planning.layout_rules import LayoutRules

    if path is None:
        return LayoutRules()
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"cannot read the layout {path!r}: {error}", option="layout"
        ) from error
    return LayoutRules.from_document(document)
