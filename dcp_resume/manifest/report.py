"""What differs between a checkpoint and what wants to load it: one item a difference.

Everything that a trainer hands in may be compared: its tensors, and the facts and positions that
its objects keep. Each difference carries a severity, so that a load can refuse before anything
changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from fnmatch import fnmatchcase

__all__ = ["ReportItem", "Severity", "newer_version", "overridden"]


class Severity(IntEnum):
    """How much a difference matters."""

    OK = 0
    """Handled: for example another topology, onto which the state is resharded."""
    WARN = 1
    """Loaded, but something is not as it was saved."""
    REFUSE = 2
    """Not loaded; nothing changes."""


@dataclass(frozen=True, slots=True, order=True)
class ReportItem:
    """One difference."""

    severity: Severity
    kind: str
    """``missing``, ``unexpected``, ``shape``, ``dtype``, ``kind``, ``layout``, ``segments``,
    ``padding``, ``tied``, ``per_rank``, ``topology``, ``model``, ``optimizer``, ``data``,
    ``position``, ``precision``, ``software``, ``rng``, ``trainer`` or
    ``version``."""
    where: str
    """FQN, or the field of the manifest."""
    message: str

    def __str__(self) -> str:
        return f"{self.severity.name.lower()}: {self.where}: {self.message} [{self.kind}]"


FINAL_KINDS = frozenset({"shape", "dtype", "kind", "layout", "segments", "leaf", "position"})
"""Differences that make a load impossible, whatever the caller accepts."""


def newer_version(saved: Mapping[str, object], known: int) -> tuple[ReportItem, ...]:
    """Refuse the state of an object that a newer version of its class saved.

    >>> [str(item) for item in newer_version({"version": 2}, known=1)]
    ['refuse: version: saved by version 2, this library knows 1; update it [version]']
    """
    version = saved.get("version", known)
    if isinstance(version, int) and version <= known:
        return ()
    message = f"saved by version {version}, this library knows {known}; update it"
    return (ReportItem(Severity.REFUSE, "version", "version", message),)


def overridden(
    items: Iterable[ReportItem], overrides: Mapping[str, Severity]
) -> tuple[ReportItem, ...]:
    """Give items the severity that the caller decided on.

    Args:
        items: Differences.
        overrides: ``kind`` or ``kind:where`` → severity; patterns as in ``fnmatch``. The first
            that matches counts. Items of ``FINAL_KINDS`` keep theirs.

    >>> item = ReportItem(Severity.REFUSE, "model", "num_layers", "saved 12, now 24")
    >>> overridden([item], {"model:num_*": Severity.WARN})[0].severity.name
    'WARN'
    """
    return tuple(_overridden(item, overrides) for item in items)


def _overridden(item: ReportItem, overrides: Mapping[str, Severity]) -> ReportItem:
    if item.kind in FINAL_KINDS:
        return item
    for pattern, severity in overrides.items():
        if fnmatchcase(item.kind, pattern) or fnmatchcase(f"{item.kind}:{item.where}", pattern):
            return replace(item, severity=severity)
    return item
