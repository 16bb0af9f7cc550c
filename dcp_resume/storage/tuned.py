"""What a store chose by itself, for those who want to know."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from dcp_resume.events import Choice

__all__ = ["Tuned"]


@runtime_checkable
class Tuned(Protocol):
    """A store that chooses more than the size of its reads."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What it has chosen, and why; for events."""
