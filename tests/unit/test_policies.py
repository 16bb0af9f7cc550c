"""Policies by themselves: what they refuse, what they are called, and a policy of one's own."""

from __future__ import annotations

import math
import pickle

import pytest

from dcp_resume import (
    Candidate,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepOnePer,
    KeepTagged,
    KeepYounger,
    RetentionPolicy,
)
from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.policies import DAY_S, decide
from dcp_resume.storage.posix_store import PosixStore
from tests.support.built_run import BuiltRun


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: KeepLast(0), "count"),
        (lambda: KeepLast(2.5), "count"),
        (lambda: KeepBest("loss", "least"), "mode"),
        (lambda: KeepBest("loss", "min", 0), "count"),
        (lambda: KeepEvery(-1), "steps"),
        (lambda: KeepYounger(0), "age_s"),
        (lambda: KeepYounger(math.nan), "age_s"),
        (lambda: KeepOnePer(math.inf), "interval_s"),
    ],
)
def test_what_cannot_be_kept_is_refused(make, option):
    with pytest.raises(ConfigurationError, match=option) as caught:
        make()
    assert caught.value.option == option


def test_a_union_is_a_value_that_says_what_it_is():
    policy = KeepLast(3) | KeepBest("loss", "min", 2) | KeepEvery(10) | KeepTagged()
    policy = policy | KeepYounger(1.5 * DAY_S) | KeepOnePer(90) | KeepAll()
    assert str(policy) == (
        "last 3, best 2 loss:min, every 10 steps, tagged, younger than 36h, one per 90s, keep all"
    )
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert policy != KeepLast(3)


def candidate(seq, created_s):
    return Candidate(seq=seq, step=seq, generation=1, created_s=created_s, metrics={})


def test_one_whose_time_is_not_known_is_kept():
    candidates = [candidate(1, 0.0), candidate(2, math.nan), candidate(3, 1e9)]
    assert set(KeepYounger(1.0).keep(candidates)) == {2, 3}
    assert set(KeepOnePer(1e12).keep(candidates)) == {2, 3}
    assert set(KeepYounger(1.0).keep([*candidates, candidate(4, math.nan)])) == {1, 2, 3, 4}
    assert KeepYounger(1.0).keep([]) == {}


class KeepOdd(RetentionPolicy):
    def keep(self, candidates):
        return {one.seq: "" for one in candidates if one.step % 2} | {99: "not there"}


def test_a_policy_of_ones_own_keeps_without_a_reason_too(tmp_path):
    run = BuiltRun(PosixStore(tmp_path / "run"))
    run.save(1, 2, 3, 4)
    assert [one.reason for one in decide(run.log.history, KeepOdd())] == [
        "KeepOdd",
        "",
        "KeepOdd",
        "newest",
    ]
    assert [one.is_kept for one in decide(run.log.history, KeepOdd() | KeepLast(2))] == [
        *(True, False, True, True)
    ]
