"""What each policy keeps in each situation: one table, equal on a local run and on S3."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from dcp_resume.manager.policies import (
    DAY_S,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepOnePer,
    KeepTagged,
    KeepYounger,
    RetentionPolicy,
    decide,
)
from dcp_resume.manager.retention import prune
from dcp_resume.manifest.keys import parse_attempt_prefix
from dcp_resume.session.litter import find_litter, remove_litter
from dcp_resume.session.sweep import read_needs
from dcp_resume.storage import open_store
from tests.support.built_run import SHARD, BuiltRun

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Scenario:
    name: str
    build: Callable[[BuiltRun], object]
    policy: RetentionPolicy
    kept: str
    """``generation:step`` of each checkpoint that must remain, in commit order."""
    files: str = ""
    """Attempts that have files afterwards, where they are not those of the kept ones alone."""


SCENARIOS: list[Scenario] = []


def scenario(policy: RetentionPolicy, kept: str, files: str = "") -> Callable[..., object]:
    def add(build: Callable[[BuiltRun], object]) -> object:
        name = build.__name__.replace("_", " ").strip()
        SCENARIOS.append(Scenario(name, build, policy, kept, files))
        return build

    return add


@scenario(KeepLast(2), "1:30 1:40")
def last_two(run):
    run.save(10, 20, 30, 40)


@scenario(KeepLast(9), "1:10 1:20")
def last_has_more_places_than_there_are(run):
    run.save(10, 20)


@scenario(KeepLast(2), "1:100 1:110")
def numbers_are_no_names(run):
    run.save(90, 100, 110)


@scenario(KeepLast(2), "1:10 1:20", "a1 a2 a3")
def an_attempt_without_commit_does_not_count(run):
    run.save(10, 20)
    run.attempt(30)


@scenario(KeepLast(2), "1:20 1:30 1:40")
def a_damaged_one_does_not_count_and_stays(run):
    run.save(10, 20, 30, 40)
    run.quarantine(30)


@scenario(KeepLast(2), "1:20 1:30 1:40")
def pinned_ones_are_set_aside(run):
    run.save(10, 20, 30, 40)
    run.pin(30)


@scenario(KeepLast(1), "1:40")
def an_unpinned_one_goes(run):
    run.save(10, 40)
    run.pin(10)
    run.unpin(10)


@scenario(KeepLast(2), "1:20 2:60")
def the_resume_source_takes_a_place(run):
    run.save(10, 20)
    run.open(20)
    run.save(40, 50, 60)


@scenario(KeepLast(2), "3:30 4:40")
def a_former_resume_source_does_not(run):
    run.save(10, 20)
    run.open(10)
    run.open(20)
    run.save(30)
    run.open(30)
    run.save(40)


@scenario(KeepLast(2), "1:50 2:60")
def a_rollback_goes_on_with_smaller_numbers(run):
    run.save(50, 160, 180, 200)
    run.open(50)
    run.save(60)


@scenario(KeepLast(3), "1:50 1:200 2:60")
def what_a_rollback_left_behind_is_older(run):
    run.save(50, 160, 180, 200)
    run.open(50)
    run.save(60)


@scenario(KeepLast(2), "2:40 2:60")
def equal_steps_of_two_generations(run):
    run.save(40, 60, 80)
    run.open(None)
    run.save(40, 60)


@scenario(KeepEvery(1000), "1:60")
def a_line_begun_anew_leaves_the_last_good_one(run):
    run.save(40, 60)
    run.open(None)


@scenario(KeepBest("loss", "min", 2), "1:20 1:30 1:50")
def best_two_by_loss(run):
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0), (50, 5.0)):
        run.save(step, loss=loss)


@scenario(KeepBest("accuracy", "max"), "1:20 1:30")
def best_by_a_metric_that_grows(run):
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        run.save(step, accuracy=accuracy)


@scenario(KeepBest(), "1:20 1:30")
def of_equals_the_younger_is_best(run):
    run.save(10, 20, loss=1.0)
    run.save(30, loss=2.0)


@scenario(KeepBest(), "1:20 1:40")
def nan_is_never_best(run):
    for step, loss in ((10, NAN), (20, 7.0), (30, NAN), (40, NAN)):
        run.save(step, loss=loss)


@scenario(KeepBest("loss", "min", 3), "1:20 1:40")
def without_the_metric_none_competes(run):
    run.save(10, 30)
    run.save(20, loss=1.0)
    run.save(40)


@scenario(KeepBest("perplexity"), "1:30")
def nobody_has_the_metric(run):
    run.save(10, 20, 30, loss=1.0)


@scenario(KeepBest("loss", "min", 2), "1:20 1:30 1:40")
def infinities_are_numbers(run):
    for step, loss in ((10, INF), (20, -INF), (30, 5.0), (40, INF)):
        run.save(step, loss=loss)


@scenario(KeepBest(), "1:10 2:20")
def what_a_rollback_left_behind_is_never_best(run):
    run.save(10, loss=2.0)
    run.save(20, 30, loss=0.1)
    run.open(10)
    run.save(20, loss=3.0)


@scenario(KeepEvery(100), "1:100 1:200 1:210")
def every_hundred_steps(run):
    run.save(50, 100, 150, 200, 210)


@scenario(KeepEvery(100), "1:50 1:300 2:100 2:110")
def of_a_step_that_was_saved_twice_the_younger(run):
    run.save(50, 100, 300)
    run.open(50)
    run.save(100, 110)


@scenario(KeepEvery(7), "1:40")
def no_step_is_a_multiple(run):
    run.save(10, 20, 40)


@scenario(KeepYounger(3 * DAY_S), "1:30 1:40 1:50 1:60")
def younger_than_three_days(run):
    run.save(10, 20, 30, 40, 50, 60)


@scenario(KeepYounger(DAY_S), "1:20 1:30")
def a_run_that_stood_still_for_years_loses_nothing_young(run):
    run.day = -3650.0
    run.save(10, 20, days=30)
    run.save(30, days=0.25)


@scenario(KeepYounger(3 * DAY_S), "1:10 1:30")
def a_clock_that_went_back_keeps_more(run):
    run.save(10, days=10)
    run.save(20, days=-9)
    run.save(30, days=4)


@scenario(KeepOnePer(DAY_S), "1:30 1:50 1:60")
def one_per_day(run):
    run.save(10, 20, 30, days=0.25)
    run.save(40, days=0.5)
    run.save(50, days=0.25)
    run.save(60)


@scenario(KeepLast(1) | KeepBest() | KeepEvery(100), "1:20 1:100 1:130")
def a_union_keeps_what_any_keeps(run):
    for step, loss in ((10, 3.0), (20, 1.0), (100, 2.0), (120, 4.0), (130, 5.0)):
        run.save(step, loss=loss)


@scenario(KeepLast(1) | KeepTagged(), "1:10 1:30 1:40")
def tagged_ones(run):
    run.save(10, 20, 30, 40)
    run.tag(10, "first")
    run.tag(20, "good")
    run.tag(30, "good")  # the name moves


@scenario(KeepLast(1), "1:30")
def a_tag_alone_keeps_nothing(run):
    run.save(10, 30)
    run.tag(10, "first")


@scenario(KeepBest(), "1:20 2:30 2:40")
def the_resume_source_stays_whatever_the_policy(run):
    run.save(10, 20, loss=2.0)
    run.open(20)
    run.save(30, loss=1.0)
    run.save(40, loss=9.0)


@scenario(KeepLast(1), "1:50 1:200 2:60")
def a_pinned_one_that_a_rollback_left_behind(run):
    run.save(50, 200)
    run.pin(200)
    run.open(50)
    run.save(60)


@scenario(KeepEvery(1000), "1:20 1:30")
def the_last_good_one_is_before_a_damaged_newest(run):
    run.save(10, 20, 30)
    run.quarantine(30)


@scenario(KeepLast(1), "1:10 1:20")
def nothing_goes_where_all_are_damaged(run):
    run.save(10, 20)
    run.quarantine(10)
    run.quarantine(20)


@scenario(KeepAll(), "1:10 1:20 1:30")
def keep_all(run):
    run.save(10, 20, 30)


@scenario(KeepLast(1), "1:30")
def a_damaged_manifest_does_not_save_its_files(run):
    run.save(10, 20, 30)
    run.damage(10)
    run.lose(20)


@scenario(KeepLast(1), "1:30")
def a_lost_catalog_does_not_save_its_files(run):
    run.save(10, 20, 30)
    run.lose(10, "catalog.json")
    run.damage(20, "catalog.json")


@scenario(KeepLast(1), "1:30", "a1 a2 a3")
def files_that_a_live_one_refers_to_stay(run):
    run.save(10, 20, 30, is_incremental=True)


@scenario(KeepLast(1), "1:40")
def they_go_with_the_last_one_that_refers_to_them(run):
    run.save(10, 20, 30, is_incremental=True)
    list(prune(run.store, run.log, KeepLast(1)))
    run.save(40)


@scenario(KeepLast(1), "1:20 1:30", "a1 a2 a3")
def what_a_damaged_live_one_needs_nobody_knows(run):
    run.save(10)
    run.save(20, is_incremental=True)
    run.save(30)
    run.quarantine(20)
    run.damage(20, "catalog.json")


@scenario(KeepLast(1), "1:40")
def a_deletion_that_was_cut_off_is_finished(run):
    run.save(10, 20, 30, 40)
    keys = run.key(10), run.key(20, SHARD)
    run.retire(10)
    run.retire(20)
    run.store.delete(keys)
    litter = find_litter(run.store, run.log, until_s=0.0)
    assert sorted(map(len, litter.retired.values())) == [3, 3]
    remove_litter(run.store, run.log, litter)


def outcome(run: BuiltRun, policy: RetentionPolicy) -> tuple[object, ...]:
    """Carry the policy out; everything that must be equal on every store."""
    reasons = [one.reason for one in decide(run.log.refresh(), policy)]
    pruned = list(prune(run.store, run.log, policy))
    assert all(one.is_retired and one.failure is None for one in pruned)
    assert list(prune(run.store, run.log, policy)) == [], "a second time there is nothing to do"
    assert all(one.is_kept for one in decide(run.log.history, policy))
    live = run.log.history.live_commits()
    keys = run.attempt_keys()
    for seq, record in live.items():
        if seq not in run.log.history.quarantined:
            assert read_needs(run.store, record) <= set(keys)
    sizes = [(one.entry.seq, one.swept) for one in pruned]
    kept = [f"{record.generation}:{record.step}" for record in live.values()]
    attempts = sorted({place[1] for place in map(parse_attempt_prefix, keys) if place})
    committed = sorted(record.attempt for record in live.values())
    return kept, attempts, committed, reasons, sizes, keys


@pytest.fixture(scope="module")
def s3_root(s3_server):
    bucket = f"b-{uuid.uuid4().hex}"
    s3_server.make_bucket(bucket)
    numbers = itertools.count()
    return lambda: (f"s3://{bucket}/run-{next(numbers)}", s3_server.storage_options)


def test_there_are_thirty_scenarios_or_more():
    assert len({one.name for one in SCENARIOS}) == len(SCENARIOS) >= 30


def build(url, options, one):
    run = BuiltRun(open_store(url, storage_options=options))
    one.build(run)
    return run


def check_on(run, one):
    kept, attempts, committed, *rest = outcome(run, one.policy)
    assert kept == one.kept.split()
    assert attempts == (one.files.split() or committed)
    return kept, attempts, rest


@pytest.mark.parametrize("one", SCENARIOS, ids=lambda one: one.name)
def test_on_a_local_run(tmp_path, one):
    check_on(build(str(tmp_path / "run"), {}, one), one)


@pytest.mark.s3
@pytest.mark.parametrize("one", SCENARIOS, ids=lambda one: one.name)
def test_on_s3_it_is_the_same(tmp_path, s3_root, one):
    run = build(*s3_root(), one)
    try:
        found = check_on(run, one)
    finally:
        run.store.close()
    assert found == check_on(build(str(tmp_path / "run"), {}, one), one)
