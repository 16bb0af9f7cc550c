"""The actors of the simulation: trainers and a pruner, on the real log and commit code.

A checkpoint's data is one object, ``<attempt>/catalog.json``: a list of the keys that the
checkpoint needs, its own first. So "all files are there" and "sweep what nobody needs" can be
told from the store alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

from dcp_resume.errors import (
    CheckpointNotFound,
    CommitRefused,
    CommitUnknown,
    DcpResumeError,
    OutcomeUnknown,
    RetireRefused,
    StorageError,
)
from dcp_resume.manager.policies import RetentionPolicy
from dcp_resume.manager.retention import prune
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.keys import attempt_prefix, log_key
from dcp_resume.manifest.models import DocumentRef, TrainerFacts
from dcp_resume.manifest.records import CommitRecord, LogRecord, OpenRecord
from dcp_resume.manifest.wire import encode
from dcp_resume.session import commit as rules
from dcp_resume.session import marks
from dcp_resume.session.litter import Litter, find_litter, remove_litter
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.sweep import sweep

from .scripted import Program, ScriptedStore

RUN = "run-0"
CREATED = "2026-01-01T00:00:00Z"
NOW = datetime(2026, 1, 1, tzinfo=UTC)

MakeLog = Callable[..., RunLog]
ChooseParent = Callable[[RunHistory], CommitEntry | None]
Sweep = Callable[[ScriptedStore, RunHistory, int], object]
Remove = Callable[[ScriptedStore, RunLog, Litter], object]
Share = Callable[[Sequence[str]], Sequence[str]]
"""Which of the keys that its parent needs, the parent's own first, an incremental commit needs."""


def all_of_parent(keys: Sequence[str]) -> Sequence[str]:
    return keys


def elders_of_parent(keys: Sequence[str]) -> Sequence[str]:
    """All that the parent wrote has changed; what it refers to has not."""
    return keys[1:]


def catalog_key(record: CommitRecord) -> str:
    return attempt_prefix(record.step, record.attempt) + "catalog.json"


def new_log(store: ScriptedStore, make_log: MakeLog, patience: int) -> RunLog:
    """A log whose clock moves only by sleeping: ``patience`` lost answers are endured."""
    ticks = itertools.count()
    return make_log(
        store,
        run=RUN,
        deadline_s=0.1 + patience,
        clock=lambda: float(next(ticks)),
        sleep=lambda _: None,
        now=lambda: NOW,
    )


def trainer(
    name: str,
    steps: tuple[int, ...],
    *,
    generation: int | None = None,
    full: bool = False,
    patience: int = 2,
    make_log: MakeLog = RunLog,
    choose_parent: ChooseParent = RunHistory.newest,
    share: Share = all_of_parent,
    choose_source: Callable[[RunHistory], int | None] = rules.choose_newest,
) -> Program:
    """Opens the run (unless it owns ``generation`` from the start), then saves ``steps``."""

    def program(store: ScriptedStore) -> object:
        log = new_log(store, make_log, patience)
        log.refresh()
        store.go_live()
        own = generation
        if own is None:
            own = rules.open_run(log, incarnation=name, choose=choose_source).generation
        for number, step in enumerate(steps):
            attempt = f"{name}{number}"
            try:
                committed = _save(store, log, own, step, attempt, full, choose_parent, share)
            except CommitUnknown:
                continue  # its files are kept
            except (CommitRefused, StorageError):
                store.delete([attempt_prefix(step, attempt) + "catalog.json"])
                continue
            store.acknowledged.append((committed.seq, own, step))
        return None

    return program


def _save(
    store: ScriptedStore,
    log: RunLog,
    generation: int,
    step: int,
    attempt: str,
    full: bool,
    choose_parent: ChooseParent,
    share: Share,
) -> rules.Committed:
    history = log.history
    parent = None if full else choose_parent(history)
    key = attempt_prefix(step, attempt) + "catalog.json"
    needed = [key]
    if parent is not None:
        needed += share(json.loads(store.read(catalog_key(parent.record), max_bytes=2**20)))
    store.write(key, [memoryview(json.dumps(needed).encode())])
    return rules.commit(
        log,
        generation=generation,
        step=step,
        attempt=attempt,
        manifest=DocumentRef(key=key, size=1, digest="xxh3-128:" + "0" * 32),
        parent=parent.seq if parent else None,
        references=_owners(history, parent, needed) if parent else [],
        planned_at=history.last_seq,
        num_bytes=1,
        trainer=TrainerFacts(step=step),
    )


def _owners(history: RunHistory, parent: CommitEntry, needed: Sequence[str]) -> list[int]:
    known = (parent.seq, *parent.record.references)
    return [seq for seq in known if catalog_key(history.commits[seq]) in needed]


def needs(store: ScriptedStore, record: CommitRecord) -> frozenset[str]:
    """What the simulated catalog of a checkpoint names."""
    return frozenset(json.loads(store.read(catalog_key(record), max_bytes=2**20)))


sweep_unneeded: Sweep = partial(sweep, needs=needs)


def cleaner(
    *, make_log: MakeLog = RunLog, remove: Remove = remove_litter, rounds: int = 1
) -> Program:
    """Removes litter, without any grace: what it finds may be about to commit."""

    def program(store: ScriptedStore) -> object:
        log = new_log(store, make_log, 2)
        log.refresh()
        store.go_live()
        for _ in range(rounds):
            litter = find_litter(store, log, until_s=0.0, needs=needs)
            try:
                remove(store, log, litter)
            except OutcomeUnknown:
                continue
        return None

    return program


def pruner(
    rounds: int = 1,
    *,
    patience: int = 2,
    make_log: MakeLog = RunLog,
    sweep: Sweep = sweep_unneeded,
) -> Program:
    """Retires the oldest checkpoint that may go, and sweeps; ``rounds`` times."""

    def program(store: ScriptedStore) -> object:
        log = new_log(store, make_log, patience)
        log.refresh()
        store.go_live()
        for _ in range(rounds):
            history = log.refresh()
            spare = [seq for seq in history.live_commits() if seq not in history.protected()]
            if not spare:
                return None
            try:
                retired = marks.retire(log, spare[0])
            except (CheckpointNotFound, RetireRefused, OutcomeUnknown):
                continue
            sweep(store, retired.history, spare[0])
        return None

    return program


def policy_pruner(policy: RetentionPolicy, *, make_log: MakeLog = RunLog) -> Program:
    """``dcp-resume prune``, or a trainer's retention, with this policy."""

    def program(store: ScriptedStore) -> object:
        log = new_log(store, make_log, 2)
        log.refresh()
        store.go_live()
        return [pruned.is_retired for pruned in prune(store, log, policy)]

    return program


def quarantiner(target: int, *, make_log: MakeLog = RunLog) -> Program:
    """Finds a checkpoint damaged."""

    def program(store: ScriptedStore) -> object:
        log = new_log(store, make_log, 2)
        log.refresh()
        store.go_live()
        try:
            marks.quarantine(log, target)
        except DcpResumeError as error:
            return repr(error)
        return None

    return program


def initial_objects(
    checkpoints: Mapping[int, tuple[str, tuple[str, ...]]],
) -> dict[str, bytes]:
    """A run that generation 1 opened, with its commits.

    Args:
        checkpoints: Step → attempt, and the attempts (of earlier steps) whose files it needs too.
    """
    opened = OpenRecord(
        run=RUN, created=CREATED, generation=1, resume_source=None, incarnation="first"
    )
    records: list[LogRecord] = [opened]
    objects: dict[str, bytes] = {}
    keys: dict[str, tuple[int, str]] = {}
    for step, (attempt, ancestors) in checkpoints.items():
        key = attempt_prefix(step, attempt) + "catalog.json"
        needed = [key, *(keys[ancestor][1] for ancestor in ancestors)]
        objects[key] = json.dumps(needed).encode()
        record = CommitRecord(
            run=RUN,
            created=CREATED,
            generation=1,
            step=step,
            attempt=attempt,
            manifest=DocumentRef(key=key, size=1, digest="xxh3-128:" + "0" * 32),
            parent=keys[ancestors[-1]][0] if ancestors else None,
            references=tuple(keys[ancestor][0] for ancestor in ancestors),
            num_bytes=1,
            trainer=TrainerFacts(step=step),
        )
        records.append(record)
        keys[attempt] = (len(records), key)
    return objects | {log_key(n): encode(record) for n, record in enumerate(records, 1)}
