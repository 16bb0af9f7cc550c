"""Look at a run from outside, after something went wrong: steps, bytes, leftovers."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dcp_resume.manifest.history import CommitEntry
from dcp_resume.manifest.keys import parse_attempt_prefix, parse_log_key
from dcp_resume.session.located import Located
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.verify import verify_checkpoint
from dcp_resume.storage import ObjectStore, open_store

__all__ = ["Found", "look_at", "look_at_root"]


@dataclass(frozen=True)
class Found:
    """What lies under a run's root."""

    steps: tuple[int, ...]
    """Of the checkpoints that count, in the order of their commits."""
    problems: tuple[str, ...]
    """What is wrong with any of them, every byte being proved."""
    strays: tuple[str, ...]
    """Keys of neither the log nor an attempt."""
    unfinished: tuple[str, ...]
    """Temporary files, open uploads."""


def look_at(store: ObjectStore) -> Found:
    """Read the log, prove every checkpoint that was not retired, and list every key."""
    history = RunLog(store).refresh()
    live = history.live_commits()
    problems = [f"record {seq}: {why}" for seq, why in history.ignored.items()]
    problems += [f"commit {seq} is quarantined" for seq in history.quarantined]
    for seq, record in live.items():
        verification = verify_checkpoint(store, Located.of(CommitEntry(seq, record)))
        problems += map(str, verification.problems)
    keys = [info.key for info in store.list("")]
    return Found(
        steps=tuple(record.step for record in live.values()),
        problems=tuple(problems),
        strays=tuple(k for k in keys if parse_log_key(k) is None and not parse_attempt_prefix(k)),
        unfinished=tuple(info.key for info in store.unfinished("")),
    )


def look_at_root(root: Path) -> Found:
    """The same of a run on disk."""
    with closing(open_store(str(root))) as store:
        return look_at(store)
