"""The runs that this process has opened through DCP's door, by URL.

Trainers make a new StorageWriter for every save; all writers of one process are one incarnation,
and share one generation, one vote transport and one pool of staging buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcp_resume.session.attempt import Run
from dcp_resume.session.ownership import own_run
from dcp_resume.session.ranks import Ranks
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.staging import BufferPool
from dcp_resume.session.votes import LonelyVotes, Votes
from dcp_resume.storage import ObjectStore, open_store

__all__ = ["Incarnation", "incarnation_of"]


@dataclass(slots=True)
class Incarnation:
    """One run, as this process knows it."""

    store: ObjectStore
    log: RunLog
    pool: BufferPool = field(default_factory=BufferPool)
    loaded_seq: int | None = None
    """Log number of the commit that this process loaded last: what its saves descend from."""
    run: Run | None = None
    _ranks: Ranks | None = None

    def own(self, votes: Votes | None = None) -> Run:
        """Open the run for writing, once; alone on the coordinator, or in rounds with all ranks.

        Raises:
            UnsupportedStore: The store lacks exclusive create.
            StoreNotShared: Some rank sees another store.
            StorageError: The store failed.
        """
        if self.run is None:
            self.run = own_run(
                self.store,
                self.log,
                votes or LonelyVotes(),
                lambda _: self.loaded_seq,
                is_probed=False,
            )
        return self.run

    def votes(self, *, step: int, deadline_s: float) -> Votes:
        """Rounds over an own store. The first call runs one collective of the default group."""
        if self._ranks is None:
            self._ranks = Ranks()
        return self._ranks.votes(step=step, deadline_s=deadline_s)


_incarnations: dict[str, Incarnation] = {}
_lock = threading.Lock()


def incarnation_of(url: str, storage_options: Mapping[str, Any]) -> Incarnation:
    """The incarnation of this process in the run at ``url``."""
    with _lock:
        if url not in _incarnations:
            store = open_store(url, storage_options=storage_options)
            _incarnations[url] = Incarnation(store, RunLog(store))
        return _incarnations[url]


def forget_incarnations() -> None:
    """Close and forget all; the next writer opens a new generation."""
    with _lock:
        for incarnation in _incarnations.values():
            incarnation.store.close()
        _incarnations.clear()
