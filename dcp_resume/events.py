"""What happened, how long it took, how many bytes: typed events and their subscribers.

>>> seen = []
>>> unsubscribe = subscribe(seen.append)
>>> emit(StorageRetried(key="log/000000000001.json", attempt=2, delay_s=0.1, reason="503"))
>>> seen[0].key
'log/000000000001.json'
>>> unsubscribe()
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "ChangesWritten",
    "CheckpointCommitted",
    "CheckpointRetired",
    "CheckpointSkipped",
    "Choice",
    "Event",
    "FileWritten",
    "HostMemoryNotPinned",
    "LitterRemoved",
    "LoadFinished",
    "NoticeSourceFailed",
    "OrphanEnded",
    "ParentUnread",
    "PhaseFinished",
    "PlanAgreed",
    "PreemptionFinished",
    "PreemptionNoticed",
    "RetentionFailed",
    "RunOpened",
    "SaveAdvanced",
    "SaveFailed",
    "StepReached",
    "StorageRetried",
    "TrainerBlocked",
    "TuningChosen",
    "VoteStoreLost",
    "emit",
    "subscribe",
]

_log = logging.getLogger("dcp_resume")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events."""

    level: ClassVar[int] = logging.DEBUG
    """At which the ``dcp_resume`` logger gets it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOpened(Event):
    """This incarnation appended its ``open`` record and owns the run."""

    level: ClassVar[int] = logging.INFO
    url: str
    generation: int
    resume_step: int | None
    """Step of the resume source; None at the beginning of a run."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing that the library chose by itself."""

    name: str
    value: int | str
    unit: str
    """Empty for a count or a name."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningChosen(Event):
    """This process took a run's store over, and chose how to work with it."""

    level: ClassVar[int] = logging.INFO
    url: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReached(Event):
    """This rank begins a numbered step of a save; ``session.save`` lists them."""

    number: int
    step: int
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseFinished(Event):
    """One phase of a save ended on this rank."""

    phase: str
    """``plan``, ``stage``, ``write``, or on the coordinator ``commit``."""
    step: int
    rank: int
    duration_s: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveAdvanced(Event):
    """A save got further on this rank."""

    milestone: str
    """``planned``, ``staged`` (unless the save blocks, the trainer goes on), ``written`` (durably),
    ``durable`` (every rank's, seen by the coordinator) or ``committed`` (known to this rank)."""
    step: int
    rank: int
    elapsed_s: float
    """Since ``save`` was called on this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWritten(Event):
    """The store has a data file of this rank, durably."""

    key: str
    num_bytes: int
    duration_s: float
    """In the store alone, retries included."""
    cpu_s: float
    """Of CPU, by the threads that write and send, from the first digest on; files that are sent at
    the same time count each other's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerBlocked(Event):
    """A call of ``save`` returned on this rank: so long did its trainer stand still."""

    step: int
    rank: int
    duration_s: float
    waited_s: float
    """Of these, for an earlier save to end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanAgreed(Event):
    """The ranks agreed who writes what."""

    step: int
    rank: int
    is_remembered: bool
    """Whether an earlier save's plan serves, because no rank's structure has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemoryNotPinned(Event):
    """A buffer for copies from or to a device is ordinary memory: they hold the host meanwhile."""

    num_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangesWritten(Event):
    """This rank wrote what has changed since the parent, and refers to its files for the rest."""

    step: int
    rank: int
    written_bytes: int
    """Headers included."""
    referenced_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentUnread(Event):
    """This rank could not tell what has changed since the parent, and writes all of its chunks."""

    level: ClassVar[int] = logging.WARNING
    step: int
    rank: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointCommitted(Event):
    """A checkpoint became the newest of the run."""

    level: ClassVar[int] = logging.INFO
    url: str
    step: int
    attempt: str
    num_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRetired(Event):
    """A checkpoint was taken out of the run by the retention policy, and its files deleted."""

    level: ClassVar[int] = logging.INFO
    step: int
    num_bytes: int
    """Of its files, and of older ones' that it alone still needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LitterRemoved(Event):
    """What earlier incarnations left, and no checkpoint needs, was deleted."""

    level: ClassVar[int] = logging.INFO
    num_files: int
    num_bytes: int
    """Of the files; open uploads do not tell theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionFailed(Event):
    """A checkpoint or litter could not be removed; the commit stands, the next one tries again."""

    level: ClassVar[int] = logging.WARNING
    step: int | None
    """Of the checkpoint; None where litter, or the log, is meant."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """A save did not commit."""

    level: ClassVar[int] = logging.ERROR
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFinished(Event):
    """A checkpoint was loaded and verified."""

    level: ClassVar[int] = logging.INFO
    url: str
    step: int
    rank: int
    num_bytes: int
    duration_s: float
    cpu_s: float
    """Of CPU, by all threads of this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSkipped(Event):
    """A newer checkpoint was passed over on load, with the reason; an older one is tried."""

    level: ClassVar[int] = logging.WARNING
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionNoticed(Event):
    """This rank heard from its own sources that it will be stopped."""

    level: ClassVar[int] = logging.WARNING
    rank: int
    reason: str
    grace_s: float
    """Seconds until it will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionFinished(Event):
    """All ranks leave, after what there was time for."""

    level: ClassVar[int] = logging.WARNING
    step: int
    action: str
    """``save``, ``save_without_optimizer``, ``wait`` (for a save that ran) or ``leave``."""
    left_s: float
    """What was left of the grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoticeSourceFailed(Event):
    """A function that was asked for a notice raised; it is asked again."""

    level: ClassVar[int] = logging.WARNING
    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteStoreLost(Event):
    """The store of the process group is gone: a notice can no longer be agreed on."""

    level: ClassVar[int] = logging.WARNING
    rank: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanEnded(Event):
    """The launcher is gone, this rank's trainer did not end in time, and its process is ended."""

    level: ClassVar[int] = logging.CRITICAL
    rank: int
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageRetried(Event):
    """A transient storage fault is about to be retried."""

    key: str
    attempt: int
    delay_s: float
    reason: str


_subscribers: list[Callable[[Event], object]] = []
_lock = threading.Lock()


def subscribe(subscriber: Callable[[Event], object]) -> Callable[[], None]:
    """Call ``subscriber`` with every event of this process, from whichever thread emits it.

    Returns:
        A function that ends the subscription.
    """
    with _lock:
        _subscribers.append(subscriber)

    def unsubscribe() -> None:
        with _lock:
            if subscriber in _subscribers:
                _subscribers.remove(subscriber)

    return unsubscribe


def emit(event: Event) -> None:
    """Hand an event to every subscriber, and to the ``dcp_resume`` logger at the event's level.

    A subscriber that raises is logged with its traceback and does not disturb the save.
    """
    _log.log(event.level, "%s", event)
    with _lock:
        subscribers = tuple(_subscribers)
    for subscriber in subscribers:
        try:
            subscriber(event)
        except Exception:
            _log.exception("event subscriber %r failed on %s", subscriber, event)
