"""The rules of the run's log for ``open`` and ``commit``; ``marks.py`` has those of other records.

``open``        one append chooses the resume source and takes the run over
``commit``      refused to a fenced writer, for a step committed before, for lost references, and
                for an attempt that was given up

Each rule is checked again at every number that is tried. A commit has three outcomes: ``Committed``
is returned; ``CommitRefused``, ``Fenced`` or a ``StorageError`` is raised where it certainly did
not happen; ``CommitUnknown`` where nobody can tell yet, and its files must be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from dcp_resume.errors import (
    CheckpointNotFound,
    CommitRefused,
    CommitUnknown,
    ConfigurationError,
    Fenced,
    OutcomeUnknown,
    ParentRetired,
)
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.models import DocumentRef, TrainerFacts
from dcp_resume.manifest.records import (
    CommitRecord,
    LogRecord,
    OpenRecord,
    SaveTimes,
)
from dcp_resume.session.run_log import RunLog

__all__ = [
    "Committed",
    "Opened",
    "check_owner",
    "choose_newest",
    "commit",
    "no_checkpoint",
    "open_run",
]


class Opened(NamedTuple):
    """What an incarnation of the run owns after its ``open``."""

    generation: int
    resume_source: int | None
    """Log number of the commit to resume from; None to begin anew."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The checkpoint counts, whatever happens to this process from now on."""

    seq: int
    record: CommitRecord


def choose_newest(history: RunHistory) -> int | None:
    """Resume from the newest usable commit; the usual choice of ``open_run``."""
    newest = history.newest()
    return newest.seq if newest else None


def open_run(
    log: RunLog,
    *,
    incarnation: str,
    choose: Callable[[RunHistory], int | None] = choose_newest,
) -> Opened:
    """Take the run over: every older incarnation is fenced from this record on.

    Args:
        log: The run's log.
        incarnation: Random id of this incarnation; a repeated call with the same id returns what
            the first one opened.
        choose: Returns the log number of the commit to resume from, or None to begin anew; called
            again whenever a record slips in before ours.

    Raises:
        CheckpointNotFound: ``choose`` named something that is no usable commit.
        OutcomeUnknown: The store gave no answer in time; call again with the same ``incarnation``.
        StorageError: The store failed; the run was not taken over.
    """

    def build(history: RunHistory) -> LogRecord:
        source = choose(history)
        if source is not None and not history.is_usable(source):
            raise no_checkpoint(log, source, "it is no usable commit of this run")
        return OpenRecord(
            run=log.run,
            created=log.timestamp(),
            generation=history.generation + 1,
            resume_source=source,
            incarnation=incarnation,
        )

    log.settle()
    for record in log.refresh().opens.values():
        if record.incarnation == incarnation:
            return Opened(record.generation, record.resume_source)
    opened = log.append(build, lambda _: None).record
    assert isinstance(opened, OpenRecord)
    return Opened(opened.generation, opened.resume_source)


def commit(
    log: RunLog,
    *,
    generation: int,
    step: int,
    attempt: str,
    manifest: DocumentRef,
    parent: int | None,
    references: Iterable[int],
    planned_at: int,
    num_bytes: int,
    trainer: TrainerFacts,
    created: str | None = None,
    times: SaveTimes | None = None,
) -> Committed:
    """Make an attempt, whose files are all written, a checkpoint.

    Args:
        log: The log through which this incarnation opened the run.
        generation: Our generation.
        step: Step of the attempt.
        attempt: Its id; a repeated call with the same id returns the first one's commit.
        manifest: Its manifest, relative to the run's root.
        parent: Log number of the newest commit at planning.
        references: Commits to whose files the attempt refers: the parent, and what it refers to.
        planned_at: Last log number read when ``parent`` was chosen.
        num_bytes: Bytes of its data files.
        trainer: What ``ls`` shows.
        created: When the state was saved, of a copy; None for now.
        times: When the save got how far; None where that was not measured.

    Raises:
        ParentRetired: A checkpoint that the attempt refers to was retired or quarantined since.
        CommitRefused: The step is committed already, the attempt was dropped as litter, the
            references are not the parent's, or an earlier record's outcome is still unknown.
        CommitUnknown: The store gave no answer in time; call again with the same ``attempt``.
        Fenced: A newer incarnation owns the run.
        StorageError: The store failed; the attempt certainly did not commit.
    """
    wanted = tuple(sorted(set(references)))

    def check(history: RunHistory) -> None:
        check_owner(history, generation)
        _check_step_is_free(history, generation, step)
        _check_not_dropped(history, step, attempt)
        _check_references(history, step, parent, wanted, planned_at)

    def build(_: RunHistory) -> LogRecord:
        return CommitRecord(
            run=log.run,
            created=created or log.timestamp(),
            generation=generation,
            step=step,
            attempt=attempt,
            manifest=manifest,
            parent=parent,
            references=wanted,
            num_bytes=num_bytes,
            trainer=trainer,
            times=times,
        )

    try:
        log.settle()
        earlier = log.history.find_attempt(attempt)
        if earlier is not None:
            return Committed(*earlier)
        appended = log.append(build, check)
    except OutcomeUnknown as error:
        raise _not_settled(log, step, attempt, error) from error
    assert isinstance(appended.record, CommitRecord)
    return Committed(appended.seq, appended.record)


def check_owner(history: RunHistory, generation: int) -> None:
    """Refuse whoever does not own the run.

    Raises:
        Fenced: A newer incarnation does.
        ConfigurationError: ``generation`` did not open it.
    """
    # Generations only grow, so whoever was fenced once is refused here for good.
    if history.generation > generation:
        raise Fenced(
            f"generation {generation} may not append: generation {history.generation} has opened "
            f"the run (log record {max(history.opens)}). End this process; the newer one goes on.",
            generation=generation,
            found_generation=history.generation,
        )
    if history.generation < generation:
        raise ConfigurationError(
            f"generation {generation} has not opened this run; the log read so far ends with "
            f"generation {history.generation}. Use the RunLog of open_run, or refresh it.",
            option="generation",
        )


def _check_step_is_free(history: RunHistory, generation: int, step: int) -> None:
    for seq, record in history.commits.items():
        if (record.generation, record.step) == (generation, step):
            raise CommitRefused(
                f"cannot commit step {step} again: attempt {record.attempt} of the same generation "
                f"{generation} committed it as log record {seq}. Save a later step.",
                step=step,
            )


def _check_not_dropped(history: RunHistory, step: int, attempt: str) -> None:
    if attempt in history.dropped:
        raise CommitRefused(
            f"cannot commit step {step}: log record {history.dropped[attempt]} gave its attempt "
            f"{attempt} up as litter, and its files may be gone. Save again, and collect litter "
            "with a longer grace time than a save takes.",
            step=step,
        )


def _check_references(
    history: RunHistory,
    step: int,
    parent: int | None,
    references: tuple[int, ...],
    planned_at: int,
) -> None:
    if not references:
        return
    source = history.commits.get(parent or 0)
    allowed = {parent, *source.references} if source else set()
    if not allowed.issuperset(references):
        # Nobody keeps another checkpoint's files for us: a sweep may have begun before planning.
        raise CommitRefused(
            f"cannot commit step {step}: it refers to files of commits {list(references)}, and "
            f"only those of its parent {parent} ({sorted(map(str, allowed))}) are sure to be kept. "
            "Save it in full.",
            step=step,
        )
    for target in (parent or 0, *references):
        lost_at = history.retired.get(target) or history.quarantined.get(target)
        # An elder that was retired before planning keeps its files as long as the parent lives.
        if lost_at is not None and (lost_at > planned_at or target == parent):
            raise ParentRetired(
                f"cannot commit step {step}: it refers to files of commit {target}, which log "
                f"record {lost_at} retired or quarantined after planning (at record {planned_at}). "
                "Save it in full.",
                step=step,
                parent=target,
            )


def no_checkpoint(log: RunLog, target: int, why: str) -> CheckpointNotFound:
    """The error for a log number that is no checkpoint."""
    return CheckpointNotFound(
        f"no checkpoint {target} in {log.url}: {why}. `dcp-resume ls` shows which there are.",
        url=log.url,
        request=f"log record {target}",
    )


def _not_settled(
    log: RunLog, step: int, attempt: str, error: OutcomeUnknown
) -> CommitUnknown | CommitRefused:
    pending = log.pending
    if isinstance(pending, CommitRecord) and pending.attempt == attempt:
        return CommitUnknown(
            f"cannot tell whether attempt {attempt} of step {step} committed to {log.url}: {error}",
            step=step,
            attempt=attempt,
        )
    earlier = pending.kind if pending is not None else "earlier"
    return CommitRefused(
        f"cannot commit step {step} to {log.url}: the outcome of this process's {earlier} record "
        f"is still unknown, and nothing may follow it: {error}",
        step=step,
    )
