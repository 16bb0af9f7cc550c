"""What the project wants to reach, and whether a run reached it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from benchmarks.names import (
    A_PAIR,
    BEST,
    CHECKPOINT,
    FETCHED,
    INDEX,
    LOADING,
    OBJECT,
    ON_COLUMNS,
    ON_ROWS,
    PLANNING_CPU,
    SECOND_SAVE,
    SPEED,
    WRITTEN,
    planned,
    training_on,
)
from benchmarks.samples import Figure

__all__ = ["GOALS", "Goal", "Verdict", "judge"]


class Sense(Enum):
    """Which side of its bound a figure should be on."""

    AT_MOST = "≤"
    AT_LEAST = "≥"


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of ours."""

    size: str
    operation: str
    measure: str
    bound: float
    sense: Sense = Sense.AT_MOST

    def is_of(self, figure: Figure) -> bool:
        """Whether it bounds this figure."""
        place = (figure.size, figure.operation, figure.measure)
        return figure.library == "dcp_resume" and place == (self.size, self.operation, self.measure)

    def is_met(self, value: float) -> bool:
        """Whether the figure keeps the bound."""
        return value <= self.bound if self.sense is Sense.AT_MOST else value >= self.bound

    def __str__(self) -> str:
        return f"{self.sense.value} {self.bound:g}"


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was found."""

    goal: Goal
    value: float

    @property
    def word(self) -> str:
        """``met`` or ``missed``."""
        return "met" if self.goal.is_met(self.value) else "missed"


def judge(figures: Sequence[Figure]) -> Iterator[Verdict]:
    """The goals of which a figure was measured, in their order."""
    for goal in GOALS:
        for figure in figures:
            if goal.is_of(figure):
                yield Verdict(goal, figure.value)


_PLANNED = planned(8192, 300, "first"), planned(8192, 300, "again")

GOALS = (
    Goal("tensor-bound", "save", "time", 1.5),
    Goal("tensor-bound", "async: stall", "time", 1.3),
    Goal("tensor-bound", "async: durable", "time", 2.0),
    Goal("tensor-bound", "lazy: stall", "time", 0.25),
    Goal("tensor-bound", "load", "time", 1.6),
    Goal("tensor-bound", "load 4 → 2", "time", 1.8),
    Goal("tensor-bound", "load 4 → 1", "time", 1.8),
    Goal("byte-bound", "save", "time", 1.15),
    Goal("byte-bound", "async: stall", "time", 1.15),
    Goal("byte-bound", "lazy: stall", "time", 0.25),
    Goal("byte-bound", "load", "time", 1.25),
    *(Goal(size, "save", "peak MiB", 64) for size in ("tensor-bound", "byte-bound")),
    *(Goal(size, "async: durable", "peak", 1.05) for size in ("tensor-bound", "byte-bound")),
    *(Goal(OBJECT, way, BEST, 1.25) for way in ("up", "down")),
    *(Goal(CHECKPOINT, way, "time", 1.25) for way in ("save", "load")),
    *(Goal("planning", operation, A_PAIR, 0.5) for operation in _PLANNED),
    *(Goal("planning", operation, PLANNING_CPU, 2.0) for operation in _PLANNED),
    Goal("planning", _PLANNED[0], INDEX, 64),
    Goal("LoRA", SECOND_SAVE, WRITTEN, 1.02),
    Goal("rows", ON_ROWS, FETCHED, 1.05),
    Goal("rows", ON_COLUMNS, FETCHED, LOADING * 1.01),  # and the documents
    Goal("training", training_on(1), SPEED, 0.95, Sense.AT_LEAST),
)
"""Ratios are to the raw limit of the same run, unless the measure says otherwise."""
