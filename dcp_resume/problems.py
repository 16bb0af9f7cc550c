"""Single faults of a document or a state, of which an error may name many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Problem", "summarise"]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of a document or a state: where it lies, its kind, and what to know about it."""

    where: str
    """Place of the fault: a key, a field path (``tensors[3].dtype``) or an FQN."""
    kind: str
    """Machine-readable kind, such as ``missing``, ``shape``, ``overlap``, ``path_escape``."""
    message: str
    """One sentence: expected and found."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.kind}]"


def summarise(problems: Sequence[Problem], *, limit: int = 20) -> str:
    """Lay problems out one a line for a message; at most ``limit`` lines, with the rest counted."""
    lines = [f"  - {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit} more")
    return "\n".join(lines)
