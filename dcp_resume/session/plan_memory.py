"""What the owner of a run remembers of the plans that it made; no memory of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcp_resume.planning.outline import OutlineMemory

__all__ = ["PlanMemory"]


@dataclass(slots=True)
class PlanMemory:
    """Of one rank, over the saves and loads of one run."""

    outline: OutlineMemory = field(default_factory=OutlineMemory)
