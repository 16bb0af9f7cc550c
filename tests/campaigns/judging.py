"""What one start of the job came to, and whether anything of it must not happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tests.campaigns.kills import Plan
from tests.campaigns.speakers import Report

__all__ = ["ENDINGS", "Finding", "Start", "judge"]

ENDINGS = frozenset({"finished", "error", "untyped"})
"""The last report of a rank that was not killed."""


class Witness(Protocol):
    """A rank that reported."""

    rank: int
    reports: list[Report]

    def all(self, what: str) -> list[Report]:
        """Its reports of one kind."""


@dataclass(frozen=True)
class Finding:
    """Something that must not happen."""

    kind: str
    """``lost``, ``inexact``, ``unusable``, ``hang``, ``untyped``, ``litter`` or ``fenced``."""
    text: str


@dataclass
class Start:
    """What happened between one start of the job and its end."""

    plan: Plan
    resumed: int | None = None
    """Step from which the ranks went on; None if they died before they knew."""
    durable: int = 0
    """Highest step that was acknowledged."""
    killed_at: str = ""
    """What the first victim was doing."""
    detection_s: list[float] = field(default_factory=list)
    """From the kill to the error of each surviving rank."""
    errors: Counter[str] = field(default_factory=Counter)
    """Type of the survivors' errors."""
    num_loads: int = 0
    num_retries: int = 0
    num_early_errors: int = 0
    """Ranks that missed another's answer before anything was killed: too short a deadline."""
    duration_s: float = 0.0
    busy_s: float = 0.0
    """From ready to finished, of the slowest rank that finished."""
    calls: dict[int, dict[str, int]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def judge(start: Start, ranks: Sequence[Witness], killed_s: float, floor: int) -> None:
    """Read the reports of all ranks into ``start``.

    Args:
        start: Of the job.
        ranks: Those that it had.
        killed_s: When the first of them, or the server, was killed; infinity if none was.
        floor: Highest step that earlier starts acknowledged as durable.
    """
    plan = start.plan
    start.killed_at = _place_of(ranks[plan.victims[0] if plan.victims else 0], killed_s)
    for rank in ranks:
        start.durable = max([start.durable, *(r["step"] for r in rank.all("durable"))])
        start.num_loads += len(rank.all("loaded"))
        start.num_retries += len(rank.all("retried"))
        for finished in rank.all("finished"):
            start.calls[rank.rank] = finished["calls"]
            start.busy_s = max(start.busy_s, finished["at_s"] - rank.all("ready")[0]["at_s"])
        start.findings += _findings_of(rank, floor)
        _judge_errors(start, rank, killed_s)
        is_ended = bool(rank.reports) and rank.reports[-1]["what"] in ENDINGS
        if not is_ended and rank.rank not in plan.victims:
            start.findings.append(Finding("untyped", f"rank {rank.rank} ended without a word"))
    resumed = {report["step"] for rank in ranks for report in rank.all("resumed")}
    if len(resumed) > 1:
        start.findings.append(Finding("unusable", f"ranks resumed from steps {sorted(resumed)}"))
    start.resumed = max(resumed, default=None)


def _findings_of(rank: Witness, floor: int) -> list[Finding]:
    found = [
        Finding("lost", f"rank {rank.rank} resumed step {r['step']}, {floor} was durable")
        for r in rank.all("resumed")
        if r["step"] < floor
    ]
    found += [
        Finding("inexact", f"rank {rank.rank}: {report}")
        for report in (*rank.all("resumed"), *rank.all("loaded"))
        if not report["is_exact"]
    ]
    found += [Finding("unusable", str(report)) for report in rank.all("skipped")]
    found += [Finding("untyped", report["trace"]) for report in rank.all("untyped")]
    return found


def _judge_errors(start: Start, rank: Witness, killed_s: float) -> None:
    is_server_killed = start.plan.is_server_killed
    if not is_server_killed:
        start.findings += [Finding("litter", str(report)) for report in rank.all("unswept")]
    for error in rank.all("error"):
        kind, text = error["type"], f"rank {rank.rank}: {error['message']}"
        start.errors[kind] += 1
        if kind == "Fenced":
            start.findings.append(Finding("fenced", text))
        elif error["at_s"] >= killed_s:
            if not is_server_killed:
                start.detection_s.append(error["at_s"] - killed_s)
        elif kind == "RankSilent":
            start.num_early_errors += 1
        else:
            start.findings.append(Finding("unusable", text))


def _place_of(rank: Witness, killed_s: float) -> str:
    """What a rank was doing when it was killed."""
    if rank.all("finished"):
        return "at rest"
    places = [report["name"] for report in rank.all("place") if report["at_s"] <= killed_s]
    return places[-1] if places else "start"
