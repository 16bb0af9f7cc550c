"""Records that say something of commits, or of attempts: who may append which.

``retire``            refused for what the run, or the caller's policy, needs
``pin`` … ``untag``   for commits that exist
``drop``              for attempts that never committed

Each rule is checked again at every number that is tried, so that it holds for the log up to the
record itself: a checkpoint that was pinned a moment before is not retired.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from dcp_resume.errors import CheckpointNotFound, ConfigurationError, RetireRefused
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.records import (
    DropRecord,
    LogRecord,
    PinRecord,
    QuarantineRecord,
    RetireRecord,
    TagRecord,
    UnpinRecord,
    UnquarantineRecord,
    UntagRecord,
    is_tag_name,
)
from dcp_resume.session.commit import check_owner, no_checkpoint
from dcp_resume.session.run_log import Appended, RunLog

__all__ = ["drop", "pin", "quarantine", "retire", "tag", "unpin", "unquarantine", "untag"]

Objection = Callable[[RunHistory], str]
"""Why a checkpoint may not be retired, by the log so far; empty if it may."""


def retire(
    log: RunLog,
    target: int,
    *,
    reason: str = "",
    generation: int | None = None,
    objection: Objection = lambda _: "",
) -> Appended:
    """Take a checkpoint out of the run, so that its files may be swept.

    Args:
        log: The run's log.
        target: Log number of the commit.
        reason: For people.
        generation: The caller's generation, if a trainer retires; operators have none.
        objection: Asked at each number that is tried; what it says is why the retire is refused.

    Returns:
        The record, and the history up to it: a sweep keeps what *that* history's live commits
        need.

    Raises:
        CheckpointNotFound: No such commit, or it is retired already.
        RetireRefused: The last good commit, the live resume source, a pinned one, or one that
            the caller objects to.
        Fenced: A newer incarnation owns the run.
        OutcomeUnknown: The store gave no answer in time; delete nothing.
        StorageError: The store failed; nothing was retired.
    """

    def check(history: RunHistory) -> None:
        why = _need(history, target) if target in history.protected() else objection(history)
        if why:
            step = history.commits[target].step
            raise RetireRefused(
                f"cannot retire checkpoint {target} (step {step}) of {log.url}: {why}. Choose "
                "another one.",
                target=target,
                step=step,
            )

    def build(_: RunHistory) -> LogRecord:
        return RetireRecord(run=log.run, created=log.timestamp(), target=target, reason=reason)

    return _mark(log, target, generation, build, check)


def quarantine(
    log: RunLog, target: int, *, reason: str = "", generation: int | None = None
) -> Appended:
    """Say that a checkpoint is damaged: nobody resumes from it, and its files are kept.

    Raises:
        CheckpointNotFound: No such commit, or it is retired already.
        Fenced: ``generation`` is given, and a newer incarnation owns the run.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; nothing was quarantined.
    """

    def build(_: RunHistory) -> LogRecord:
        return QuarantineRecord(run=log.run, created=log.timestamp(), target=target, reason=reason)

    return _mark(log, target, generation, build)


def pin(log: RunLog, target: int, *, label: str = "") -> Appended:
    """Keep a checkpoint whatever the retention policy says.

    Raises:
        CheckpointNotFound: No such commit, or it is retired already.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; nothing was pinned.
    """

    def build(_: RunHistory) -> LogRecord:
        return PinRecord(run=log.run, created=log.timestamp(), target=target, label=label)

    return _mark(log, target, None, build)


def unpin(log: RunLog, target: int) -> Appended:
    """Lift a pin.

    Raises:
        CheckpointNotFound: No such commit, or it is retired already.
        ConfigurationError: It is not pinned.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; the pin holds.
    """

    def check(history: RunHistory) -> None:
        if target not in history.pinned:
            raise ConfigurationError(
                f"cannot unpin checkpoint {target} of {log.url}: it is not pinned; pinned are "
                f"{sorted(history.pinned)}. Choose one of them.",
                option="target",
            )

    def build(_: RunHistory) -> LogRecord:
        return UnpinRecord(run=log.run, created=log.timestamp(), target=target)

    return _mark(log, target, None, build, check)


def unquarantine(log: RunLog, target: int) -> Appended:
    """Lift a quarantine: the checkpoint counts again.

    Raises:
        ConfigurationError: It is not quarantined, or it was retired.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; the quarantine holds.
    """

    def check(history: RunHistory) -> None:
        if target not in history.quarantined or target in history.retired:
            held = sorted(history.quarantined.keys() - history.retired.keys())
            raise ConfigurationError(
                f"cannot lift the quarantine of checkpoint {target} of {log.url}: those in "
                f"quarantine are {held}. Choose one of them.",
                option="target",
            )

    def build(_: RunHistory) -> LogRecord:
        return UnquarantineRecord(run=log.run, created=log.timestamp(), target=target)

    log.refresh()
    return log.append(build, check)


def tag(log: RunLog, target: int, name: str) -> Appended:
    """Give a checkpoint a name, which moves if another one has it.

    Raises:
        CheckpointNotFound: No such commit, or it is retired already.
        ConfigurationError: The name cannot be one.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; the name is as it was.
    """
    if not is_tag_name(name):
        raise ConfigurationError(
            f"cannot name a checkpoint {name!r}; expected a letter and up to 63 more of "
            "[a-z0-9._-], and not latest, best or all. Choose another name.",
            option="name",
        )

    def build(_: RunHistory) -> LogRecord:
        return TagRecord(run=log.run, created=log.timestamp(), target=target, name=name)

    return _mark(log, target, None, build)


def untag(log: RunLog, name: str) -> Appended:
    """Take a name away.

    Raises:
        CheckpointNotFound: No checkpoint has it.
        OutcomeUnknown: The store gave no answer in time.
        StorageError: The store failed; the name is as it was.
    """

    def check(history: RunHistory) -> None:
        if name not in history.tags:
            raise CheckpointNotFound(
                f"no checkpoint of {log.url} is tagged {name!r}; tags are "
                f"{sorted(history.tags)}. Choose one of them.",
                url=log.url,
                request=name,
            )

    def build(_: RunHistory) -> LogRecord:
        return UntagRecord(run=log.run, created=log.timestamp(), name=name)

    log.refresh()
    return log.append(build, check)


def drop(log: RunLog, attempts: Collection[str], *, generation: int | None = None) -> set[str]:
    """Give attempts up, so that their files may be swept: no commit of them counts from now on.

    Args:
        log: The run's log.
        attempts: Ids of attempts that did not commit, as far as the caller knows; at most 1,000.
        generation: The caller's generation, if a trainer drops; operators have none.

    Returns:
        Those that were given up; the others have committed meanwhile.

    Raises:
        Fenced: A newer incarnation owns the run.
        OutcomeUnknown: The store gave no answer in time; delete nothing.
        StorageError: The store failed; nothing was dropped.
    """

    def uncommitted(history: RunHistory) -> set[str]:
        return {*attempts} - {record.attempt for record in history.commits.values()}

    def check(history: RunHistory) -> None:
        if generation is not None:
            check_owner(history, generation)

    def build(history: RunHistory) -> LogRecord:
        names = tuple(sorted(uncommitted(history)))
        return DropRecord(run=log.run, created=log.timestamp(), attempts=names)

    if not uncommitted(log.refresh()):
        return set()
    record = log.append(build, check).record
    assert isinstance(record, DropRecord)
    return {*record.attempts}


def _mark(
    log: RunLog,
    target: int,
    generation: int | None,
    build: Callable[[RunHistory], LogRecord],
    check: Callable[[RunHistory], None] = lambda _: None,
) -> Appended:
    def check_all(history: RunHistory) -> None:
        if generation is not None:
            check_owner(history, generation)
        if target not in history.commits:
            raise no_checkpoint(log, target, "the log has no such commit")
        if target in history.retired:
            raise no_checkpoint(log, target, f"record {history.retired[target]} retired it")
        check(history)

    log.refresh()
    return log.append(build, check_all)


def _need(history: RunHistory, target: int) -> str:
    if target in history.pinned:
        return "it is pinned"
    last_good = history.last_good()
    if last_good is not None and last_good.seq == target:
        return "it is the newest whole one, and must outlive the others"
    return f"the live generation {history.generation} resumed from it"
