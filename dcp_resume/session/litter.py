"""What lies under a run's root and belongs to no checkpoint, and how it goes.

An attempt that never committed may still be about to. So it is given up first, by a ``drop``
record: a commit that comes later is refused, and what committed before is not dropped. Age decides
nothing but politeness; it is told by the store's clock alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dcp_resume.manifest.keys import LOG_PREFIX, PROBE_PREFIX, STEP_PREFIX, parse_attempt_prefix
from dcp_resume.session.marks import drop
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.sweep import Needs, Swept, delete_swept, read_needs, unneeded
from dcp_resume.storage import ObjectInfo, ObjectStore, read_clock

__all__ = ["Litter", "find_litter", "grace_limit", "list_attempts", "remove_litter"]

_DROPS_A_RECORD = 1000
"""A record holds at most 64 KiB."""


@dataclass(frozen=True, slots=True)
class Litter:
    """What belongs to no checkpoint."""

    retired: Mapping[int, tuple[ObjectInfo, ...]]
    """Retired commit → what a deletion that was cut off, or failed, left of it."""
    attempts: Mapping[str, tuple[ObjectInfo, ...]]
    """Attempt that never committed → its files."""
    unfinished: tuple[ObjectInfo, ...]
    """Open uploads and temporary files."""
    probes: tuple[ObjectInfo, ...]
    """Keys by which a store was tested."""

    @property
    def num_objects(self) -> int:
        """Files, uploads and probes in all."""
        grouped = (*self.retired.values(), *self.attempts.values())
        return sum(map(len, (*grouped, self.unfinished, self.probes)))


def grace_limit(store: ObjectStore, grace_s: float) -> float:
    """The time, by the store's clock, since when things are too young to be litter.

    Writes one small object, and removes it, to learn what time it is there.

    Args:
        store: Root of the run.
        grace_s: Seconds of grace.

    Raises:
        StorageError: The store failed.
    """
    return read_clock(store, PROBE_PREFIX) - grace_s


def list_attempts(store: ObjectStore) -> dict[tuple[int, str], list[ObjectInfo]]:
    """The files of every attempt, by its step and name.

    Args:
        store: Root of the run.

    Raises:
        StorageError: The store failed.
    """
    found: dict[tuple[int, str], list[ObjectInfo]] = defaultdict(list)
    for info in store.list(STEP_PREFIX):
        place = parse_attempt_prefix(info.key)
        if place is not None:
            found[place].append(info)
    return found


def find_litter(
    store: ObjectStore, log: RunLog, *, until_s: float, needs: Needs = read_needs
) -> Litter:
    """Look for litter, by one listing of all attempts.

    Args:
        store: Root of the run.
        log: Its log; it is read anew.
        until_s: Attempts, uploads and probes with anything younger are left alone; see
            ``grace_limit``. What is left of retired checkpoints needs no grace.
        needs: Reads what a live checkpoint needs.

    Raises:
        InvalidDocument: A record of the log is malformed.
        StorageError: The store failed.
    """
    found = list_attempts(store)
    history = log.refresh()
    numbers = {(r.step, r.attempt): seq for seq, r in history.commits.items()}
    committed = {attempt for _, attempt in numbers}
    retired: dict[int, tuple[ObjectInfo, ...]] = {}
    attempts: dict[str, tuple[ObjectInfo, ...]] = {}
    for place, infos in found.items():
        if numbers.get(place) in history.retired:
            seq = numbers[place]
            retired[seq] = tuple(unneeded(store, history, seq, infos, needs=needs))
        elif place[1] not in committed and all(info.modified_s <= until_s for info in infos):
            attempts[place[1]] = (*attempts.get(place[1], ()), *infos)
    prefixes = (STEP_PREFIX, LOG_PREFIX, PROBE_PREFIX)
    unfinished = (info for prefix in prefixes for info in store.unfinished(prefix))
    return Litter(
        {seq: infos for seq, infos in retired.items() if infos},
        attempts,
        tuple(info for info in unfinished if info.modified_s <= until_s),
        tuple(info for info in store.list(PROBE_PREFIX) if info.modified_s <= until_s),
    )


def remove_litter(
    store: ObjectStore, log: RunLog, litter: Litter, *, generation: int | None = None
) -> Swept:
    """Remove what ``find_litter`` found.

    Args:
        store: Root of the run.
        log: Its log.
        litter: What to remove.
        generation: The caller's generation, if a trainer cleans; operators have none.

    Returns:
        Files and bytes that went; uploads are not counted, since stores do not tell their size.

    Raises:
        Fenced: A newer incarnation owns the run.
        OutcomeUnknown: It is not known whether the attempts were given up; nothing was deleted.
        StorageError: The store failed; some litter remains for the next time.
    """
    given_up = {*log.history.dropped}
    for names in _batches([name for name in litter.attempts if name not in given_up]):
        given_up |= drop(log, names, generation=generation)
    swept = Swept()
    for seq, found in litter.retired.items():
        swept += delete_swept(store, log.history.commits[seq], found)
    dead = (infos for name, infos in litter.attempts.items() if name in given_up)
    files = [info for infos in (*dead, litter.probes) for info in infos]
    store.delete([info.key for info in files])
    store.discard(litter.unfinished)
    return swept + Swept.of(files)


def _batches(names: list[str]) -> Iterable[list[str]]:
    for start in range(0, len(names), _DROPS_A_RECORD):
        yield names[start : start + _DROPS_A_RECORD]
