"""Carry a retention policy out: retire what it does not keep, sweep, and clear litter away."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from dcp_resume.errors import CheckpointNotFound, DcpResumeError, RetireRefused
from dcp_resume.events import CheckpointRetired, LitterRemoved, RetentionFailed, emit
from dcp_resume.manager.policies import DAY_S, Decision, KeepAll, RetentionPolicy, decide
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.session.litter import find_litter, grace_limit, remove_litter
from dcp_resume.session.marks import retire
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.sweep import Swept, sweep
from dcp_resume.storage import ObjectStore

__all__ = ["LITTER_GRACE_S", "Pruned", "Retention", "prune"]

LITTER_GRACE_S = DAY_S
"""Younger litter is left alone: it may belong to a save that is still running."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of one checkpoint that a policy does not keep."""

    entry: CommitEntry
    is_retired: bool
    swept: Swept = field(default_factory=Swept)
    failure: DcpResumeError | None = None
    """Why it was not retired, or not swept whole; None if all went well."""


def prune(
    store: ObjectStore,
    log: RunLog,
    policy: RetentionPolicy,
    *,
    generation: int | None = None,
) -> Iterator[Pruned]:
    """Retire and sweep what the policy does not keep, the oldest first, one at a time.

    What another process retires, pins or needs meanwhile is left to it. Ends after a failure to
    retire; goes on after a failure to sweep.

    Args:
        store: Root of the run.
        log: Its log; it is read anew.
        policy: What to keep.
        generation: The caller's generation, if a trainer prunes; operators have none.

    Raises:
        DcpResumeError: The log cannot be read.
    """
    for decision in decide(log.refresh(), policy):
        if decision.is_kept:
            continue
        try:
            _retire(log, policy, decision.entry.seq, generation)
        except (RetireRefused, CheckpointNotFound):
            continue  # by what the log says now, it stays, or is retired already
        except DcpResumeError as error:
            yield Pruned(decision.entry, is_retired=False, failure=error)
            return
        yield _sweep(store, log.history, decision.entry)


def _retire(log: RunLog, policy: RetentionPolicy, target: int, generation: int | None) -> None:
    def find(decisions: list[Decision]) -> str:
        return next((one.reason for one in decisions if one.entry.seq == target), "")

    retire(
        log,
        target,
        reason=f"retention: {policy}",
        generation=generation,
        # Records may slip in before ours: the choice must still be right behind them.
        objection=lambda history: find(decide(history, policy)),
    )


def _sweep(store: ObjectStore, history: RunHistory, entry: CommitEntry) -> Pruned:
    try:
        swept = sweep(store, history, entry.seq)
    except DcpResumeError as error:
        return Pruned(entry, is_retired=True, failure=error)
    return Pruned(entry, is_retired=True, swept=swept)


class Retention:
    """Prunes after each commit, in a thread of its own. The coordinator's.

    A failure does not undo the commit, and is no failure of the save: it is an event, and the next
    commit tries again. The first pass also clears away what earlier incarnations left.

    Args:
        policy: What to keep; ``KeepAll`` deletes nothing, not even litter.
    """

    def __init__(self, policy: RetentionPolicy) -> None:
        self._policy = policy
        self._thread = ThreadPoolExecutor(1, "dcp-resume-retention")
        self._last: Future[None] | None = None
        self._unswept: dict[int, CommitEntry] = {}
        self._is_tidy = False

    def start(self, store: ObjectStore, log: RunLog, generation: int) -> None:
        """Begin a pass, after the one that is running; one that waits already serves too."""
        is_waiting = self._last is not None and not (self._last.running() or self._last.done())
        if not isinstance(self._policy, KeepAll) and not is_waiting:
            self._last = self._thread.submit(self._pass, store, log, generation)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until no pass is running.

        Raises:
            TimeoutError: Still running after ``timeout_s``.
        """
        if self._last is not None:
            self._last.result(timeout_s)

    def close(self) -> None:
        """Wait for the running pass."""
        self._thread.shutdown()

    def _pass(self, store: ObjectStore, log: RunLog, generation: int) -> None:
        try:
            for entry in list(self._unswept.values()):
                self._report(_sweep(store, log.history, entry))
            for pruned in prune(store, log, self._policy, generation=generation):
                self._report(pruned)
            if not self._is_tidy:
                self._tidy(store, log, generation)
        except DcpResumeError as error:
            emit(RetentionFailed(step=None, reason=str(error)))

    def _report(self, pruned: Pruned) -> None:
        step = pruned.entry.record.step
        if pruned.failure is not None:
            if pruned.is_retired:
                self._unswept[pruned.entry.seq] = pruned.entry
            emit(RetentionFailed(step=step, reason=str(pruned.failure)))
            return
        self._unswept.pop(pruned.entry.seq, None)
        emit(CheckpointRetired(step=step, num_bytes=pruned.swept.num_bytes))

    def _tidy(self, store: ObjectStore, log: RunLog, generation: int) -> None:
        litter = find_litter(store, log, until_s=grace_limit(store, LITTER_GRACE_S))
        if litter.num_objects:
            swept = remove_litter(store, log, litter, generation=generation)
            emit(LitterRemoved(num_files=swept.num_files, num_bytes=swept.num_bytes))
        self._is_tidy = True
