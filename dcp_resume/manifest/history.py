"""What a run's log says, folded into one value: who owns the run, and which checkpoints count.

    seq  record                     generation 1 ── 40 ── 60 ── 80
      1  open 1                                    └─ generation 2 (resumed from 40) ── 60
    2–4  commit 40, 60, 80
      5  open 2, resumes from 2     lineage, newest first: 60 (seq 6), 40 (seq 2)
      6  commit 60                  hidden by the rollback: 80 (seq 4), 60 (seq 3)

The fold is pure: equal records give an equal history, on every rank and in every process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from dcp_resume.errors import InvalidDocument, Problem, RunMismatch
from dcp_resume.manifest.keys import log_key
from dcp_resume.manifest.records import (
    CommitRecord,
    DropRecord,
    LogRecord,
    OpenRecord,
    PinRecord,
    QuarantineRecord,
    RetireRecord,
    TagRecord,
    UnpinRecord,
    UnquarantineRecord,
    UntagRecord,
)

__all__ = ["CommitEntry", "RunHistory"]

_Mark = RetireRecord | PinRecord | UnpinRecord | QuarantineRecord | UnquarantineRecord | TagRecord


class CommitEntry(NamedTuple):
    """One checkpoint of the run."""

    seq: int
    """Log number of its commit record: the checkpoint's identity within the run."""
    record: CommitRecord


@dataclass(frozen=True, slots=True)
class RunHistory:
    """All records of a log up to ``last_seq``. Mappings are by log number and in its order."""

    run: str | None = None
    """UUID of the run; None before its first record."""
    last_seq: int = 0
    generation: int = 0
    """Highest generation that opened the run; 0 before the first."""
    opens: Mapping[int, OpenRecord] = field(default_factory=dict)
    sources: Mapping[int, int | None] = field(default_factory=dict)
    """Generation → log number of the commit that it resumed from."""
    commits: Mapping[int, CommitRecord] = field(default_factory=dict)
    """Every commit that ever counted, retired or not."""
    retired: Mapping[int, int] = field(default_factory=dict)
    """Retired commit → log number of its first ``retire``."""
    quarantined: Mapping[int, int] = field(default_factory=dict)
    """Quarantined commit → log number of the ``quarantine`` in force."""
    pinned: Mapping[int, int] = field(default_factory=dict)
    """Pinned commit → log number of the ``pin`` in force."""
    tags: Mapping[str, int] = field(default_factory=dict)
    """Name → the commit that it means, retired or not."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Attempt that never may commit → log number of its first ``drop``."""
    ignored: Mapping[int, str] = field(default_factory=dict)
    """Records that do not count, with the reason; none exists unless a writer broke the rules."""

    def apply(self, seq: int, record: LogRecord) -> RunHistory:
        """The history with one more record.

        Raises:
            InvalidDocument: ``seq`` is not the next number, or the record contradicts the log.
            RunMismatch: The record belongs to another run.
        """
        return self.extend([(seq, record)])

    def extend(self, records: Iterable[tuple[int, LogRecord]]) -> RunHistory:
        """The history with more records, in order of their numbers.

        Raises:
            InvalidDocument: A number is missing, or a record contradicts the log before it.
            RunMismatch: A record belongs to another run.
        """
        fold = _Fold(self)
        for seq, record in records:
            fold.add(seq, record)
        return fold.result()

    def is_usable(self, seq: int) -> bool:
        """Whether ``seq`` is a commit that may be loaded: neither retired nor quarantined."""
        return seq in self.commits and seq not in self.retired and seq not in self.quarantined

    def lineage(self) -> Iterator[CommitEntry]:
        """Usable commits that the live generation descends from, newest first.

        A generation's commits come first, then the commit it resumed from, then that commit's
        elders. Commits that a rollback left behind are not among them.
        """
        generation, newest_allowed = self.generation, self.last_seq
        for seq, record in self._youngest_first():
            while record.generation < generation:
                source = self.sources[generation]
                if source is None:
                    return
                generation, newest_allowed = self.commits[source].generation, source
            is_on_line = record.generation == generation and seq <= newest_allowed
            if is_on_line and self.is_usable(seq):
                yield CommitEntry(seq, record)

    def newest(self) -> CommitEntry | None:
        """The checkpoint to resume from; None if there is none."""
        return next(self.lineage(), None)

    def find_step(self, step: int, *, is_any_line: bool = False) -> CommitEntry | None:
        """The youngest usable commit of ``step``.

        Args:
            step: Step to look for.
            is_any_line: Where the lineage has none, look also at commits that a rollback left
                behind.
        """
        for entry in self.lineage():
            if entry.record.step == step:
                return entry
        if is_any_line:
            for seq, record in self._youngest_first():
                if record.step == step and self.is_usable(seq):
                    return CommitEntry(seq, record)
        return None

    def find_tag(self, name: str) -> CommitEntry | None:
        """The usable commit that a tag means."""
        seq = self.tags.get(name, 0)
        return CommitEntry(seq, self.commits[seq]) if self.is_usable(seq) else None

    def tags_of(self, seq: int) -> tuple[str, ...]:
        """The names of a commit, sorted."""
        return tuple(sorted(name for name, target in self.tags.items() if target == seq))

    def find_attempt(self, attempt: str) -> CommitEntry | None:
        """The commit of an attempt, retired or not; None if the attempt never committed."""
        return next((e for e in self._youngest_first() if e.record.attempt == attempt), None)

    def best(self, metric: str = "loss", mode: Literal["min", "max"] = "min") -> CommitEntry | None:
        """The usable commit of the lineage with the best ``trainer.metrics[metric]``.

        Commits without the metric, or with NaN, do not compete; of equals the youngest wins.
        """
        best: CommitEntry | None = None
        best_score = math.inf
        for entry in self.lineage():
            value = entry.record.trainer.metrics.get(metric, math.nan)
            score = value if mode == "min" else -value
            if not math.isnan(score) and (best is None or score < best_score):
                best, best_score = entry, score
        return best

    def live_commits(self) -> Mapping[int, CommitRecord]:
        """Commits whose files must exist: all that were not retired."""
        return {seq: record for seq, record in self.commits.items() if seq not in self.retired}

    def referenced(self) -> frozenset[int]:
        """Commits, retired or not, to whose files a live commit refers."""
        return frozenset(
            target for record in self.live_commits().values() for target in record.references
        )

    def last_good(self) -> CommitEntry | None:
        """The checkpoint that must outlive all others.

        It is the newest, or where the lineage has none, the youngest that a rollback left behind.
        """
        usable = (entry for entry in self._youngest_first() if self.is_usable(entry.seq))
        return self.newest() or next(usable, None)

    def resume_source(self) -> CommitEntry | None:
        """What the live generation resumed from; None if it began anew."""
        seq = self.sources.get(self.generation)
        return CommitEntry(seq, self.commits[seq]) if seq else None

    def protected(self) -> frozenset[int]:
        """Live commits that must not be retired: last good, live resume source, pinned."""
        needed = (self.last_good(), self.resume_source())
        kept = {*self.pinned, *(entry.seq for entry in needed if entry)}
        return frozenset(kept - self.retired.keys())

    def _youngest_first(self) -> Iterator[CommitEntry]:
        return (CommitEntry(seq, self.commits[seq]) for seq in sorted(self.commits, reverse=True))


class _Fold:
    """A history while records are being added."""

    def __init__(self, history: RunHistory) -> None:
        self._run = history.run
        self._last_seq = history.last_seq
        self._generation = history.generation
        self._opens = dict(history.opens)
        self._sources = dict(history.sources)
        self._commits = dict(history.commits)
        self._retired = dict(history.retired)
        self._quarantined = dict(history.quarantined)
        self._pinned = dict(history.pinned)
        self._tags = dict(history.tags)
        self._dropped = dict(history.dropped)
        self._ignored = dict(history.ignored)
        self._steps = {(record.generation, record.step) for record in history.commits.values()}

    def result(self) -> RunHistory:
        return RunHistory(
            run=self._run,
            last_seq=self._last_seq,
            generation=self._generation,
            opens=self._opens,
            sources=self._sources,
            commits=self._commits,
            retired=self._retired,
            quarantined=self._quarantined,
            pinned=self._pinned,
            tags=self._tags,
            dropped=self._dropped,
            ignored=self._ignored,
        )

    def add(self, seq: int, record: LogRecord) -> None:
        if seq != self._last_seq + 1:
            raise _contradiction(
                seq, "gap", f"expected record {self._last_seq + 1} next, found {seq}"
            )
        self._check_run(seq, record.run)
        if isinstance(record, OpenRecord):
            self._open(seq, record)
        elif isinstance(record, CommitRecord):
            self._commit(seq, record)
        elif isinstance(record, DropRecord):
            self._drop(seq, record)
        elif isinstance(record, UntagRecord):
            self._tags.pop(record.name, None)
        else:
            self._mark(seq, record)
        self._last_seq = seq

    def _check_run(self, seq: int, run: str) -> None:
        if self._run is not None and run != self._run:
            raise RunMismatch(
                f"log record {seq} belongs to run {run}, expected {self._run}: two runs share one "
                "root. Give each run a root of its own.",
                expected=self._run,
                found=run,
            )
        self._run = run

    def _open(self, seq: int, record: OpenRecord) -> None:
        if record.generation <= self._generation:
            raise _contradiction(
                seq,
                "generation",
                f"expected a generation above {self._generation}, found {record.generation}",
            )
        source = record.resume_source
        if source is not None and source not in self._commits:
            raise _contradiction(
                seq, "dangling", f"resumes from record {source}, which is no commit before it"
            )
        self._generation = record.generation
        self._opens[seq] = record
        self._sources[record.generation] = source

    def _commit(self, seq: int, record: CommitRecord) -> None:
        place = (record.generation, record.step)
        if record.generation != self._generation:
            # A fenced writer's record that slipped in must not come before its successor's.
            self._ignored[seq] = (
                f"commit of generation {record.generation} while {self._generation} owned the run"
            )
        elif place in self._steps:
            self._ignored[seq] = f"second commit of step {record.step} in one generation"
        elif record.attempt in self._dropped:
            # Its files may be gone: they were swept after the drop.
            drop = self._dropped[record.attempt]
            self._ignored[seq] = f"commit of an attempt that record {drop} dropped"
        else:
            self._steps.add(place)
            self._commits[seq] = record

    def _drop(self, seq: int, record: DropRecord) -> None:
        committed = {commit.attempt for commit in self._commits.values()} & {*record.attempts}
        if committed:
            self._ignored[seq] = f"drop of {', '.join(sorted(committed))}, committed before it"
        for attempt in {*record.attempts} - committed:
            self._dropped.setdefault(attempt, seq)

    def _mark(self, seq: int, record: _Mark) -> None:
        if record.target not in self._commits:
            self._ignored[seq] = f"{record.kind} of {record.target}, which is no commit before it"
        elif isinstance(record, RetireRecord):
            self._retired.setdefault(record.target, seq)
        elif isinstance(record, QuarantineRecord):
            self._quarantined.setdefault(record.target, seq)
        elif isinstance(record, UnquarantineRecord):
            self._quarantined.pop(record.target, None)
        elif isinstance(record, PinRecord):
            self._pinned[record.target] = seq
        elif isinstance(record, TagRecord):
            self._tags[record.name] = record.target
        else:
            self._pinned.pop(record.target, None)


def _contradiction(seq: int, kind: str, message: str) -> InvalidDocument:
    problem = Problem(where=log_key(seq), kind=kind, message=message)
    return InvalidDocument(
        f"the run's log contradicts itself at {problem}. No writer of this library does that: "
        "restore the log directory from a copy, or begin a run under a new root.",
        problems=(problem,),
    )
