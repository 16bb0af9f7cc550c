"""Tags, attempts given up, lifted quarantines: the records, and the rules for them."""

from __future__ import annotations

import pytest

from dcp_resume.errors import (
    CheckpointNotFound,
    CommitRefused,
    ConfigurationError,
    Fenced,
    InvalidDocument,
    RetireRefused,
)
from dcp_resume.manifest.keys import log_key
from dcp_resume.manifest.records import DropRecord
from dcp_resume.manifest.seals import find_seal, seal
from dcp_resume.session import commit as rules
from dcp_resume.session import marks
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.selecting import select_commits
from dcp_resume.storage.posix_store import PosixStore
from tests.support.built_run import BuiltRun

from .faulty_log import FaultyStore, commit, new_log


@pytest.fixture
def run(tmp_path):
    return BuiltRun(PosixStore(tmp_path / "run"))


def steps(run, request):
    entries = select_commits(run.log.refresh(), request, run.store.url)
    return [(entry.record.generation, entry.record.step) for entry in entries]


# Tags


def test_a_tag_names_a_checkpoint_and_moves(run):
    run.save(10, 20)
    run.tag(10, "good")
    assert steps(run, "good") == [(1, 10)]
    run.tag(20, "good")
    run.tag(20, "fine")
    assert steps(run, "good") == [(1, 20)]
    history = RunLog(run.store).refresh()
    assert history.find_tag("good").record.step == 20
    assert history.tags_of(history.find_step(20).seq) == ("fine", "good")
    marks.untag(run.log, "good")
    assert run.log.history.tags_of(history.find_step(20).seq) == ("fine",)


def test_a_tag_of_what_was_retired_means_nothing(run):
    run.save(10, 20)
    run.tag(10, "good")
    run.retire(10)
    assert run.log.history.find_tag("good") is None
    with pytest.raises(CheckpointNotFound, match=r"tags \['good'\]"):
        steps(run, "good")


@pytest.mark.parametrize("name", ["latest", "best", "all", "400", "Good", "", "a b", "a" * 65, "ö"])
def test_names_that_a_tag_cannot_have(run, name):
    run.save(10)
    before = run.log.last_seq
    with pytest.raises(ConfigurationError, match="expected a letter") as caught:
        run.tag(10, name)
    assert caught.value.option == "name"
    assert run.log.last_seq == before


def test_a_name_that_no_checkpoint_has(run):
    run.save(10)
    with pytest.raises(CheckpointNotFound, match="tagged 'good'"):
        marks.untag(run.log, "good")


def test_a_hostile_name_is_refused_by_readers(run):
    run.save(10)
    run.tag(10, "good")
    key = log_key(run.log.last_seq)
    found = find_seal(run.store.read(key, max_bytes=2**16))
    hostile = seal(found.content.replace(b'"good"', b'"../x"'))
    run.store.write(key, [memoryview(hostile)])
    with pytest.raises(InvalidDocument, match="name"):
        RunLog(run.store).refresh()


# Selecting


def test_a_damaged_one_answers_only_where_no_other_one_does(run):
    run.save(10, 20)
    run.quarantine(20)
    assert steps(run, 20) == [(1, 20)]
    assert steps(run, "latest") == [(1, 10)]
    run.open(10)
    run.save(20)
    assert steps(run, 20) == [(2, 20)]
    assert steps(run, "all") == [(1, 10), (1, 20), (2, 20)]


# Attempts that are given up


@pytest.fixture
def store(tmp_path):
    return FaultyStore(tmp_path / "run")


@pytest.fixture
def log(store):
    log = new_log(store)
    rules.open_run(log, incarnation="first")
    return log


def test_an_attempt_that_was_given_up_never_commits(store, log):
    marks.drop(new_log(store), ["a40", "a50"])
    with pytest.raises(CommitRefused, match="record 2 gave its attempt a40 up") as caught:
        commit(log, 40)
    assert caught.value.step == 40
    assert commit(log, 40, attempt="again").seq == 3


def test_an_attempt_that_committed_is_not_given_up(store, log):
    commit(log, 40)
    assert marks.drop(new_log(store), ["b", "a40"]) == {"b"}
    assert log.refresh().dropped == {"b": 3}
    assert marks.drop(log, ["a40"]) == set()
    assert log.refresh().last_seq == 3


def test_a_commit_that_slips_in_is_left_out_of_the_drop(store, log, monkeypatch):
    operator, create = new_log(store), store.create

    def committed_meanwhile(key, data):
        monkeypatch.undo()
        commit(log, 40)
        create(key, data)

    monkeypatch.setattr(store, "create", committed_meanwhile)
    assert marks.drop(operator, ["a40", "b"]) == {"b"}
    assert operator.history.dropped == {"b": 3}
    assert operator.history.ignored == {}


def test_a_fenced_trainer_gives_nothing_up(store, log):
    rules.open_run(new_log(store), incarnation="second")
    with pytest.raises(Fenced):
        marks.drop(log, ["a40"], generation=1)


def test_records_that_break_the_rules_do_not_count(log):
    """A reader does not trust a writer: neither side of the rule can hide a checkpoint's loss."""
    committed = commit(log, 40)
    drop = DropRecord(run=log.run, created=log.timestamp(), attempts=("a40", "a50"))
    history = log.history.apply(log.last_seq + 1, drop)
    assert "a40, committed before it" in history.ignored[3]
    assert history.dropped == {"a50": 3}
    late = committed.record.model_copy(update={"step": 50, "attempt": "a50"})
    history = history.apply(4, late)
    assert history.ignored[4] == "commit of an attempt that record 3 dropped"
    assert list(history.commits) == [committed.seq]


# Last good


def test_the_last_good_one_cannot_be_retired_even_if_a_rollback_left_it_behind(run):
    run.save(10, 20)
    run.open(None)
    with pytest.raises(RetireRefused):
        run.retire(20)
    run.retire(10)
    run.save(5)
    run.retire(20)
    assert steps(run, "all") == [(2, 5)]


# A quarantine that is lifted


def test_a_lifted_quarantine_counts_no_more(store, log):
    damaged = commit(log, 40)
    with pytest.raises(ConfigurationError, match="quarantine are \\[\\]"):
        marks.unquarantine(log, damaged.seq)
    marks.quarantine(log, damaged.seq)
    marks.unquarantine(log, damaged.seq)
    assert rules.open_run(new_log(store), incarnation="second") == (2, damaged.seq)


def test_a_retired_checkpoint_is_not_lifted(log):
    damaged = commit(log, 40)
    commit(log, 60)
    marks.quarantine(log, damaged.seq)
    marks.retire(log, damaged.seq)
    with pytest.raises(ConfigurationError):
        marks.unquarantine(log, damaged.seq)
