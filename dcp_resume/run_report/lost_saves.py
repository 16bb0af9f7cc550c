"""Saves that came to nothing: what the log refused or gave up, and what lies beside it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from dcp_resume.session.litter import list_attempts
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import ObjectStore

__all__ = ["LostSave", "find_lost_saves"]


@dataclass(frozen=True, slots=True)
class LostSave:
    """An attempt without a commit that counts."""

    step: int | None
    """None where only the log tells of it, and not of which step it was."""
    attempt: str
    num_files: int
    """On storage still."""
    num_bytes: int
    written: str
    """RFC 3339, UTC, by the store's clock: when its last file was; empty without files."""
    why: str


def find_lost_saves(store: ObjectStore, log: RunLog) -> tuple[LostSave, ...]:
    """Look for them, by one listing of all attempts; oldest step first.

    Args:
        store: Root of the run.
        log: Its log; it is read anew after the listing, so that no save that commits meanwhile is
            taken for one that failed.

    Raises:
        InvalidDocument: A record of the log is malformed.
        StorageError: The store failed.
    """
    found = list_attempts(store)
    history = log.refresh()
    committed = {record.attempt for record in history.commits.values()}
    newest = history.newest()
    newest_step = -1 if newest is None else newest.record.step
    lost: list[LostSave] = []
    for (step, attempt), infos in sorted(found.items()):
        if attempt in committed:
            continue
        why = "no commit"
        if attempt in history.dropped:
            why = f"given up in log record {history.dropped[attempt]}"
        elif step > newest_step:
            why = "no commit, or under way"
        times = [info.modified_s for info in infos]
        lost.append(
            LostSave(step, attempt, len(infos), sum(i.size for i in infos), _time(max(times)), why)
        )
    seen = {attempt for _, attempt in found}
    for attempt, seq in history.dropped.items():
        if attempt not in seen:
            why = f"given up in log record {seq}, and deleted"
            lost.append(LostSave(None, attempt, 0, 0, "", why))
    return tuple(lost)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
