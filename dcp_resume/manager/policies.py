"""Retention policies: which checkpoints are worth keeping, and why. Pure, small, composable.

    KeepLast(3) | KeepBest("loss", "min", 2) | KeepEvery(10_000) | KeepYounger(7 * DAY_S)

A policy sees the candidates in commit order (generation, then step) and gives a reason for each one
that it keeps; a union keeps what any of its policies keeps. Candidates are committed checkpoints
that are neither retired nor found damaged. The last good one, the live resume source and pinned
ones are kept whatever a policy says, so a policy never has to think of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.history import CommitEntry, RunHistory

__all__ = [
    "DAY_S",
    "Candidate",
    "Decision",
    "KeepAll",
    "KeepAny",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepOnePer",
    "KeepTagged",
    "KeepYounger",
    "RetentionPolicy",
    "decide",
]

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint, as policies see it."""

    seq: int
    """Log number of its commit; grows in commit order."""
    step: int
    generation: int
    created_s: float
    """Seconds since the epoch, by the clock of the job that wrote it; NaN where the record does
    not tell."""
    metrics: Mapping[str, float]
    tags: tuple[str, ...] = ()
    is_current: bool = True
    """On the lineage of the live generation; else a rollback left it behind."""
    is_pinned: bool = False
    is_resume_source: bool = False
    """Of the live generation."""


Kept = Mapping[int, str]
"""Log number of a checkpoint → why it is kept."""


class RetentionPolicy(ABC):
    """Base of all policies; a subclass of yours works like ours."""

    __slots__ = ()

    @abstractmethod
    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """What this policy keeps, with the reason for people; it depends on nothing else.

        Args:
            candidates: In commit order, the oldest first.
        """

    def __or__(self, other: RetentionPolicy) -> RetentionPolicy:
        return KeepAny((self, other))

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, slots=True)
class KeepAll(RetentionPolicy):
    """Keeps everything: nothing is deleted."""

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        return dict.fromkeys((one.seq for one in candidates), "all")

    def __str__(self) -> str:
        return "keep all"


@dataclass(frozen=True, slots=True)
class KeepAny(RetentionPolicy):
    """Keeps what any of several policies keeps."""

    policies: tuple[RetentionPolicy, ...]

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``; reasons are joined by commas."""
        reasons: dict[int, list[str]] = {}
        for policy in self.policies:
            for seq, reason in policy.keep(candidates).items():
                reasons.setdefault(seq, []).append(reason)
        return {seq: ", ".join(several) for seq, several in reasons.items()}

    def __str__(self) -> str:
        return ", ".join(map(str, self.policies))


@dataclass(frozen=True, slots=True)
class KeepLast(RetentionPolicy):
    """Keeps the youngest ones, so that at most ``count`` remain beside pinned ones.

    Pinned ones are set aside. The live resume source, which stays anyway, takes one of the places.

    Raises:
        ConfigurationError: ``count`` is below 1.
    """

    count: int

    def __post_init__(self) -> None:
        _check_positive("KeepLast", "count", self.count)

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        pool = [one for one in candidates if not one.is_pinned]
        # Stable: commit order within the sources, and within the others.
        ranked = sorted(reversed(pool), key=lambda one: not one.is_resume_source)
        return dict.fromkeys((one.seq for one in ranked[: self.count]), str(self))

    def __str__(self) -> str:
        return f"last {self.count}"


@dataclass(frozen=True, slots=True)
class KeepBest(RetentionPolicy):
    """Keeps those with the best values of a metric of the trainer state.

    Only the lineage competes: what a rollback left behind cannot be ``best`` either. One without
    the metric, or with NaN, does not compete; of equals the younger one wins.

    Raises:
        ConfigurationError: ``mode`` is neither ``min`` nor ``max``, or ``count`` is below 1.
    """

    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigurationError(
                f"KeepBest.mode must be 'min' or 'max', got {self.mode!r}", option="mode"
            )
        _check_positive("KeepBest", "count", self.count)

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        sign = 1.0 if self.mode == "min" else -1.0
        scores = [
            (sign * one.metrics.get(self.metric, math.nan), -one.seq)
            for one in candidates
            if one.is_current
        ]
        best = sorted(score for score in scores if not math.isnan(score[0]))[: self.count]
        return {-seq: f"{self} = {sign * score:.6g}" for score, seq in best}

    def __str__(self) -> str:
        return f"best {self.count} {self.metric}:{self.mode}"


@dataclass(frozen=True, slots=True)
class KeepEvery(RetentionPolicy):
    """Keeps steps that are multiples of ``steps``; of several commits of one step the youngest.

    Raises:
        ConfigurationError: ``steps`` is below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_positive("KeepEvery", "steps", self.steps)

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        youngest = {one.step: one.seq for one in candidates if one.step % self.steps == 0}
        return dict.fromkeys(youngest.values(), str(self))

    def __str__(self) -> str:
        return f"every {self.steps} steps"


@dataclass(frozen=True, slots=True)
class KeepYounger(RetentionPolicy):
    """Keeps those made within ``age_s`` seconds before the youngest one was made.

    Age counts from the youngest checkpoint, not from now: a run that stood still for a month loses
    nothing. One whose time is not known is kept.

    Raises:
        ConfigurationError: ``age_s`` is not above 0.
    """

    age_s: float

    def __post_init__(self) -> None:
        _check_positive("KeepYounger", "age_s", self.age_s)

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        if not candidates:
            return {}
        oldest_s = candidates[-1].created_s - self.age_s
        young = (one.seq for one in candidates if not one.created_s < oldest_s)
        return dict.fromkeys(young, str(self))

    def __str__(self) -> str:
        return f"younger than {_duration_text(self.age_s)}"


@dataclass(frozen=True, slots=True)
class KeepOnePer(RetentionPolicy):
    """Keeps the youngest one of each interval of ``interval_s`` seconds, counted from 1970, UTC.

    One whose time is not known is kept.

    Raises:
        ConfigurationError: ``interval_s`` is not above 0.
    """

    interval_s: float

    def __post_init__(self) -> None:
        _check_positive("KeepOnePer", "interval_s", self.interval_s)

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        youngest: dict[float, int] = {}
        undated = [one.seq for one in candidates if math.isnan(one.created_s)]
        for one in candidates:
            if not math.isnan(one.created_s):
                youngest[one.created_s // self.interval_s] = one.seq
        return dict.fromkeys((*youngest.values(), *undated), str(self))

    def __str__(self) -> str:
        return f"one per {_duration_text(self.interval_s)}"


@dataclass(frozen=True, slots=True)
class KeepTagged(RetentionPolicy):
    """Keeps those that have a tag."""

    def keep(self, candidates: Sequence[Candidate]) -> Kept:
        """See ``RetentionPolicy.keep``."""
        return {one.seq: f"tagged {' '.join(one.tags)}" for one in candidates if one.tags}

    def __str__(self) -> str:
        return "tagged"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one checkpoint, and why."""

    entry: CommitEntry
    reason: str
    """Why it is kept; empty if it goes."""

    @property
    def is_kept(self) -> bool:
        """Whether it stays."""
        return bool(self.reason)


def decide(history: RunHistory, policy: RetentionPolicy) -> list[Decision]:
    """What becomes of every checkpoint that was not retired, in commit order.

    Kept whatever the policy says are the last good one, the live resume source, pinned ones, and
    damaged ones, which do not count.
    """
    last_good, source = history.last_good(), history.resume_source()
    lineage = {entry.seq for entry in history.lineage()}
    live = sorted(history.live_commits().items())
    candidates = [
        Candidate(
            seq=seq,
            step=record.step,
            generation=record.generation,
            created_s=_seconds(record.created),
            metrics=record.trainer.metrics,
            tags=history.tags_of(seq),
            is_current=seq in lineage,
            is_pinned=seq in history.pinned,
            is_resume_source=source is not None and source.seq == seq,
        )
        for seq, record in live
        if seq not in history.quarantined
    ]
    always = (
        ("newest", {last_good.seq} if last_good else ()),
        ("resume source", {source.seq} if source else ()),
        ("pinned", history.pinned),
        ("quarantined", history.quarantined),
    )
    kept = policy.keep(candidates)
    decisions = []
    for seq, record in live:
        reasons = [reason for reason, seqs in always if seq in seqs]
        if seq in kept:
            reasons.append(kept[seq] or str(policy))
        decisions.append(Decision(CommitEntry(seq, record), ", ".join(reasons)))
    return decisions


def _seconds(created: str) -> float:
    try:
        time = datetime.fromisoformat(created)
    except ValueError:
        return math.nan
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _check_positive(policy: str, option: str, value: float) -> None:
    is_count = option in ("count", "steps")
    if not value > 0 or not math.isfinite(value) or (is_count and not isinstance(value, int)):
        expected = "an integer of 1 or more" if is_count else "more than 0 seconds"
        raise ConfigurationError(
            f"{policy}.{option} must be {expected}, got {value!r}", option=option
        )


def _duration_text(seconds: float) -> str:
    for unit, length_s in (("d", DAY_S), ("h", 3600.0), ("m", 60.0)):
        if seconds >= length_s and seconds % length_s == 0:
            return f"{seconds / length_s:.0f}{unit}"
    return f"{seconds:g}s"
