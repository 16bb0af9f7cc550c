"""JSON from storage: refuses what ``json.loads`` lets pass in silence."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

from dcp_resume.manifest.values import Json

__all__ = ["load_strict"]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in keys.items() if count > 1)[:5]
        raise ValueError(f"keys occur twice: {twice}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def load_strict(data: bytes) -> Json:
    """Parse one UTF-8 document.

    Raises:
        ValueError: No UTF-8, no JSON, a key twice in one object (readers would disagree on which
            one counts), NaN or an infinity, or nested too deep.
    """
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
