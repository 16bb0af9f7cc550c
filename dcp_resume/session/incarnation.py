"""The runs that this process has opened through DCP's door, by URL.

Trainers make a new StorageWriter for every save; all writers of one process are one incarnation,
and share one generation, one vote transport and one pool of staging buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.session.attempt import Run
from dcp_resume.session.commit import choose_newest
from dcp_resume.session.ownership import own_run
from dcp_resume.session.plan_memory import PlanMemory
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
    memory: PlanMemory = field(default_factory=PlanMemory)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    signing: Signing = UNSIGNED
    loaded_seq: int | None = None
    """Log number of the commit that this process loaded last: what its saves descend from."""
    run: Run | None = None
    _is_shared: bool = False
    """Whether every rank holds ``run``, or the coordinator alone."""
    _ranks: Ranks | None = None

    def own(self, votes: Votes | None = None) -> Run:
        """Open the run for writing, once; alone on the coordinator, or in rounds with all ranks.

        Raises:
            UnsupportedStore: The store lacks exclusive create.
            StoreNotShared: Some rank sees another store.
            StorageError: The store failed.
        """
        if self.run is None or (votes is not None and not self._is_shared):
            # Where the coordinator owns the run already, all go on from what it wrote.
            is_owned = self.run is not None
            self.run = own_run(
                self.store,
                self.log,
                votes or LonelyVotes(),
                choose_newest if is_owned else lambda _: self.loaded_seq,
                is_probed=is_owned,
            )
            self._is_shared = votes is not None
        return self.run

    def votes(self, *, step: int, deadline_s: float) -> Votes:
        """Rounds over an own store. The first call in a default group runs one collective of it."""
        if self._ranks is None or not self._ranks.are_current:
            self._ranks = Ranks()
        return self._ranks.votes(step=step, deadline_s=deadline_s)


_incarnations: dict[str, Incarnation] = {}
_lock = threading.Lock()


def incarnation_of(
    url: str,
    storage_options: Mapping[str, Any],
    signing: Signing = UNSIGNED,
) -> Incarnation:
    """The incarnation of this process in the run at ``url``.

    Until it owns the run, other options (credentials that work, after some that did not) replace
    its store and its log.

    Raises:
        ConfigurationError: It owns the run, and signs or trusts otherwise.
    """
    with _lock:
        known = _incarnations.get(url)
        if known is not None and known.signing == signing:
            if known.run or known.storage_options == storage_options:
                return known
        elif known is not None and known.run:
            raise ConfigurationError(
                f"this process writes to {url} already, with another signing. Give every Writer "
                "and Reader of a run the same",
                option="signing",
            )
        store = open_store(url, storage_options=storage_options)
        log = RunLog(store, signing=signing)
        found = Incarnation(store, log, storage_options=dict(storage_options), signing=signing)
        if known is not None:
            found.loaded_seq = known.loaded_seq
            known.store.close()
        _incarnations[url] = found
        return found


def forget_incarnations() -> None:
    """Close and forget all; the next writer opens a new generation."""
    with _lock:
        for incarnation in _incarnations.values():
            incarnation.store.close()
        _incarnations.clear()
