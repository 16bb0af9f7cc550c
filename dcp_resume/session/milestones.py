"""When a save got how far: told as events, reported by ranks, recorded with the commit."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dcp_resume.events import SaveAdvanced, emit
from dcp_resume.manifest.models import RankTimes
from dcp_resume.manifest.records import SaveTimes

__all__ = ["Milestones", "rank_times"]

_REPORTED = ("planned", "staged", "written")
_DIGITS = 4
"""Behind the point of a recorded second: clocks of hosts agree no better."""


class Milestones:
    """Of one save on one rank; made when ``save`` is called.

    Args:
        step: Of the save.
        rank: This one.
    """

    def __init__(self, step: int, rank: int) -> None:
        self._step = step
        self._rank = rank
        self._started = time.monotonic()
        self._reached_s: dict[str, float] = {}
        self.is_blocking = False
        """Whether the trainer stands still until the commit."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since ``save`` was called."""
        return time.monotonic() - self._started

    def reach(self, milestone: str) -> None:
        """Say that the save got so far."""
        elapsed_s = self._reached_s[milestone] = self.elapsed_s
        emit(
            SaveAdvanced(milestone=milestone, step=self._step, rank=self._rank, elapsed_s=elapsed_s)
        )

    def is_reached(self, milestone: str) -> bool:
        """Whether the save got so far."""
        return milestone in self._reached_s

    def reported_us(self) -> npt.NDArray[np.int64]:
        """``[3]`` microseconds to ``planned``, ``staged`` and ``written``, for the coordinator."""
        return np.asarray([self._reached_s[name] * 1e6 for name in _REPORTED], np.int64)

    def times(self, ranks: RankTimes) -> SaveTimes:
        """What the commit record says, once all is durable; on the coordinator.

        Ranks call ``save`` at different times, but learn the plan at once: times of others are
        counted from there.

        Args:
            ranks: What each rank reported.
        """
        planned_s, durable_s = self._reached_s["planned"], self._reached_s["durable"]

        def last(reached_s: Sequence[float]) -> float:
            after = max(r - p for r, p in zip(reached_s, ranks.planned_s, strict=True))
            return min(planned_s + after, durable_s)

        staged_s, committed_s = last(ranks.staged_s), self.elapsed_s
        return SaveTimes(
            staged_s=round(staged_s, _DIGITS),
            written_s=round(last(ranks.written_s), _DIGITS),
            durable_s=round(durable_s, _DIGITS),
            committed_s=round(committed_s, _DIGITS),
            blocked_s=round(committed_s if self.is_blocking else staged_s, _DIGITS),
        )


def rank_times(reached_us: Sequence[npt.NDArray[np.int64]]) -> RankTimes | None:
    """What ranks reported, for the catalog; None where one measured nothing.

    Args:
        reached_us: Per rank ``[3]`` as of ``Milestones.reported_us``, or ``[0]``.
    """
    if any(len(one) != len(_REPORTED) for one in reached_us):
        return None
    seconds = (np.stack(reached_us) / 1e6).round(_DIGITS)
    planned, staged, written = (tuple(column) for column in seconds.T.tolist())
    return RankTimes(planned_s=planned, staged_s=staged, written_s=written)
