"""Each rule of the protocol is needed: without it, the search finds a bad state.

A mutant is made here, by a patch or a subclass; the product has no switch for it.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from dcp_resume.errors import KeyExists, KeyNotFound, OutcomeUnknown, StorageError
from dcp_resume.manager import retention
from dcp_resume.manifest.history import CommitEntry, RunHistory
from dcp_resume.manifest.keys import LOG_PREFIX, log_key, parse_log_key
from dcp_resume.manifest.records import DropRecord
from dcp_resume.session import commit as rules
from dcp_resume.session import litter, marks, run_log
from dcp_resume.session.run_log import RunLog

from .programs import (
    catalog_key,
    cleaner,
    initial_objects,
    policy_pruner,
    pruner,
    quarantiner,
    sweep_unneeded,
    trainer,
)
from .test_exhaustive import FULL, INCREMENTAL, THREE, ZOMBIE
from .test_seeds import build_first_state, simulate
from .world import POLICY, explore, start

FENCED = "a fenced generation committed"
LOST_FILES = "a committed checkpoint lost files"
TWICE = "a step was committed twice"
FORGOT = "an open forgot commits"
UNSEEN = "an acknowledged commit is not in the log"
AGAINST_POLICY = "a retire against the policy"
EMPTY = "nothing is left to resume from"


def off(*_, **__):
    return None


def kinds(programs, checkpoints=FULL, **options):
    state = start(initial_objects(checkpoints), programs)
    return set(explore(state, is_enough=True, **options).bad)


def standard(**zombie):
    return [trainer("z", (80,), generation=1, **zombie), trainer("s", (80,)), pruner(1)]


def test_without_the_fence(monkeypatch):
    monkeypatch.setattr(rules, "check_owner", off)
    assert FENCED in kinds(standard())


class SkipsAhead(RunLog):
    """Appends at the end of the log, without reading what lies before it."""

    def append(self, build, check):
        numbers = [parse_log_key(info.key) for info in self._store.list(LOG_PREFIX)]
        self._history = dataclasses.replace(self._history, last_seq=max(numbers))
        return super().append(build, check)


def test_without_reading_every_record():
    assert FENCED in kinds(standard(make_log=SkipsAhead))


def oldest(history: RunHistory) -> CommitEntry:
    return CommitEntry(*next(iter(history.live_commits().items())))


def test_any_parent_alone_is_caught_by_the_retire_check():
    assert kinds(standard(choose_parent=oldest), may_crash=ZOMBIE) == set()


def test_without_the_retire_check_alone_the_parent_rule_suffices(monkeypatch):
    monkeypatch.setattr(rules, "_check_references", off)
    assert kinds(standard(), may_crash=ZOMBIE) == set()


def test_without_both_retention_rules(monkeypatch):
    monkeypatch.setattr(rules, "_check_references", off)
    assert LOST_FILES in kinds(standard(choose_parent=oldest))


def test_the_retire_check_is_what_protects_from_quarantine(monkeypatch):
    # A quarantined parent is not the newest any more, so it may be retired under its child.
    programs = [trainer("z", (80,), generation=1), quarantiner(3), pruner(1)]
    assert kinds(programs) == set()
    monkeypatch.setattr(rules, "_check_references", off)
    assert LOST_FILES in kinds(programs)


def test_without_protected_checkpoints(monkeypatch):
    monkeypatch.setattr(RunHistory, "protected", lambda _: frozenset())
    assert kinds([trainer("s", ()), pruner(2)]) & {EMPTY, "the live resume source was retired"}


def sweep_prefix(store, history, target):
    prefix = f"step-{history.commits[target].step:08d}/"
    store.delete([info.key for info in store.list(prefix)])


def test_sweep_by_prefix():
    anew = trainer("rollback", (40,), choose_source=lambda _: None)
    assert LOST_FILES in kinds([anew, pruner(1, sweep=sweep_prefix)])


def sweep_without_mark(store, history, target):
    store.delete(json.loads(store.read(catalog_key(history.commits[target]), max_bytes=2**20)))


def test_sweep_without_mark():
    assert LOST_FILES in kinds([pruner(1, sweep=sweep_without_mark)], INCREMENTAL)


def test_sweep_before_retire(monkeypatch):
    retire = marks.retire

    def swept_first(log, target):
        retired = {**log.history.retired, target: 0}
        sweep_unneeded(log._store, dataclasses.replace(log.history, retired=retired), target)
        return retire(log, target)

    monkeypatch.setattr(marks, "retire", swept_first)
    assert LOST_FILES in kinds([pruner(1)])


def sweep_files_only(store, log, litter):
    store.delete([info.key for infos in litter.attempts.values() for info in infos])


def saving_beside(cleans):
    return [trainer("z", (80,), generation=1), cleans]


def test_removing_litter_without_giving_it_up():
    assert kinds(saving_beside(cleaner())) == set()
    assert LOST_FILES in kinds(saving_beside(cleaner(remove=sweep_files_only)))


def test_committing_what_was_given_up(monkeypatch):
    monkeypatch.setattr(rules, "_check_not_dropped", off)
    assert UNSEEN in kinds(saving_beside(cleaner()))


def test_giving_up_what_has_committed(monkeypatch):
    def drop_unasked(log, attempts, *, generation=None):
        record = DropRecord(run=log.run, created=log.timestamp(), attempts=tuple(attempts))
        log.append(lambda _: record, off)
        return {*attempts}

    monkeypatch.setattr(litter, "drop", drop_unasked)
    assert LOST_FILES in kinds(saving_beside(cleaner()))


def test_removing_litter_before_it_is_given_up():
    def too_early(store, log, found):
        sweep_files_only(store, log, found)
        litter.remove_litter(store, log, found)

    assert LOST_FILES in kinds(saving_beside(cleaner(remove=too_early)))


def test_choosing_what_to_retire_once_only(monkeypatch):
    """A checkpoint that counts is found damaged, after the choice and before the record."""
    programs = [policy_pruner(POLICY), quarantiner(4)]
    assert kinds(programs, THREE) == set()
    monkeypatch.setattr(
        retention,
        "_retire",
        lambda log, policy, target, _: marks.retire(log, target, reason=f"retention: {policy}"),
    )
    assert AGAINST_POLICY in kinds([policy_pruner(POLICY), quarantiner(4)], THREE)


def test_choosing_and_opening_apart(monkeypatch):
    open_run = rules.open_run

    def open_later(log, *, incarnation, choose):
        chosen = choose(log.refresh())
        return open_run(log, incarnation=incarnation, choose=lambda _: chosen)

    monkeypatch.setattr(rules, "open_run", open_later)
    assert FORGOT in kinds(standard())


def test_a_step_may_be_committed_again(monkeypatch):
    monkeypatch.setattr(rules, "_check_step_is_free", off)
    assert TWICE in kinds([trainer("z", (80, 80), generation=1)])


class BelievesReads(RunLog):
    """Resolves a lost answer by a read, and takes "not found" for "not created"."""

    def _create(self, pending):
        key = log_key(pending.seq)
        try:
            self._store.create(key, pending.data)
        except (KeyExists, OutcomeUnknown) as error:
            try:
                return self._store.read(key, max_bytes=2**20)
            except KeyNotFound:
                raise StorageError("not created", url=error.url, key=key) from error
        return pending.data


def test_resolving_a_lost_answer_by_a_read():
    programs = [trainer("z", (80,), generation=1, make_log=BelievesReads, patience=0)]
    assert LOST_FILES in kinds(programs, may_lose=ZOMBIE)
    programs = [trainer("z", (80,), generation=1, patience=0)]
    assert kinds(programs, may_lose=ZOMBIE) == set()


def test_not_recognising_our_own_record(monkeypatch):
    monkeypatch.setattr(run_log, "_is_same", lambda found, ours: False)
    assert LOST_FILES in kinds([trainer("z", (80,), generation=1)], may_lose=ZOMBIE)


def test_the_seeds_find_a_mutant_too_and_name_the_seed(monkeypatch):
    monkeypatch.setattr(rules, "check_owner", off)
    state = build_first_state()
    with pytest.raises(AssertionError, match=r"^seed \d+: .*a fenced generation committed"):
        all(simulate(state, seed) for seed in range(20))
