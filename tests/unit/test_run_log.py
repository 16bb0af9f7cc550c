import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest

from dcp_resume.errors import (
    CheckpointNotFound,
    CommitRefused,
    CommitUnknown,
    ConfigurationError,
    Fenced,
    InvalidDocument,
    KeyExists,
    OutcomeUnknown,
    ParentRetired,
    RetireRefused,
    RunMismatch,
    StorageDenied,
)
from dcp_resume.manifest.keys import log_key
from dcp_resume.session import commit as rules
from dcp_resume.session import marks
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage.posix_store import PosixStore

from .faulty_log import FaultyStore, commit, new_log


@pytest.fixture
def store(tmp_path):
    return FaultyStore(tmp_path / "run")


@pytest.fixture
def log(store):
    log = new_log(store)
    assert rules.open_run(log, incarnation="first") == (1, None)
    return log


# Reading


def test_refresh_reads_what_others_wrote_and_goes_on_from_there(store, log):
    other = new_log(store)
    assert other.refresh().run == log.run
    commit(log, 40)
    assert other.refresh().newest().record.step == 40
    assert other.refresh() is other.history


def test_many_records_are_read_whole(store, log):
    for step in range(30):
        commit(log, step)
    assert new_log(store).refresh() == log.history


def test_a_listing_that_lags_is_made_up_for_by_reads(store, log):
    commit(log, 40)
    commit(log, 60)
    store.hidden = (log_key(2), log_key(3))
    assert new_log(store).refresh().last_seq == 3
    store.hidden = (log_key(2),)
    assert new_log(store).refresh().last_seq == 3


def test_a_missing_record_is_a_fault_of_the_log(store, log):
    commit(log, 40)
    store.create(log_key(4), b"{}")
    with pytest.raises(InvalidDocument, match=r"hole.*000000000003\.json") as caught:
        new_log(store).refresh()
    assert caught.value.problems[0].kind == "gap"


def test_a_hostile_number_is_not_counted_up_to(store, log):
    store.create("log/999999999999.json", b"{}")
    with pytest.raises(InvalidDocument, match="hole"):
        log.refresh()


def test_foreign_files_in_the_log_directory_are_passed_over(store, log):
    store.create("log/README", b"hello")
    assert log.refresh().last_seq == 1


@pytest.mark.parametrize(("data", "kind"), [(b"{", "not_json"), (b" " * 70_000, "too_large")])
def test_a_malformed_record_is_named(store, log, data, kind):
    store.create(log_key(2), data)
    with pytest.raises(InvalidDocument, match=log_key(2)) as caught:
        log.refresh()
    assert caught.value.problems[0].kind == kind
    assert log.last_seq == 1


def test_another_run_is_refused(store, log):
    with pytest.raises(RunMismatch, match=f"belongs to run {log.run}, expected mine"):
        new_log(store, run="mine").refresh()


def test_timestamps_are_rfc_3339_in_utc(store):
    moment = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert RunLog(store, now=lambda: moment).timestamp() == "2025-12-31T23:30:00Z"
    assert datetime.fromisoformat(RunLog(store).timestamp()).tzinfo == UTC


# Opening and the fence


def test_the_next_incarnation_resumes_from_the_newest(store, log):
    newest = commit(log, 40)
    successor = new_log(store)
    assert rules.open_run(successor, incarnation="second") == (2, newest.seq)
    assert successor.run == log.run


def test_opening_twice_with_one_incarnation_opens_once(store, log):
    again = new_log(store)
    assert rules.open_run(again, incarnation="first") == (1, None)
    assert again.last_seq == 1


def test_a_record_that_slips_in_before_the_open_is_resumed_from(store, log):
    successor = new_log(store)
    seen = []

    def choose(history):
        if not seen:
            commit(log, 40)
        seen.append(history.last_seq)
        return rules.choose_newest(history)

    assert rules.open_run(successor, incarnation="second", choose=choose) == (2, 2)
    assert seen == [1, 2]


def test_opening_refuses_a_source_that_is_no_usable_commit(store, log):
    with pytest.raises(CheckpointNotFound, match="no checkpoint 7"):
        rules.open_run(new_log(store), incarnation="second", choose=lambda _: 7)


def test_a_fenced_writer_is_fenced_for_good(store, log):
    rules.open_run(new_log(store), incarnation="second")
    for _ in range(2):
        with pytest.raises(Fenced, match="generation 2 has opened") as caught:
            commit(log, 40)
        assert (caught.value.generation, caught.value.found_generation) == (1, 2)
    log.refresh()
    with pytest.raises(Fenced):
        commit(log, 60)
    with pytest.raises(Fenced):
        marks.quarantine(log, 1, generation=1)
    assert log.last_seq == 2


def test_a_log_that_did_not_open_the_run_cannot_commit(store, log):
    with pytest.raises(ConfigurationError, match="has not opened"):
        commit(new_log(store), 40)


def test_eight_writers_get_eight_numbers(store, log):
    threads = [
        threading.Thread(target=rules.open_run, args=(new_log(store),), kwargs={"incarnation": n})
        for n in "abcdefgh"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opens = log.refresh().opens
    assert [record.generation for record in opens.values()] == list(range(1, 10))
    assert log.last_seq == 9


# Committing


def test_a_commit_is_in_the_log(store, log):
    committed = commit(log, 40)
    assert committed.seq == 2
    assert new_log(store).refresh().commits == {2: committed.record}


def test_a_step_is_committed_once_in_a_generation(log):
    commit(log, 40, attempt="one")
    with pytest.raises(CommitRefused, match=r"attempt one .* log record 2"):
        commit(log, 40, attempt="two")


def test_a_repeated_commit_of_one_attempt_returns_the_first(log):
    assert commit(log, 40) == commit(log, 40)
    assert log.last_seq == 2


def test_a_commit_appends_behind_records_of_operators(store, log):
    first = commit(log, 40)
    marks.pin(new_log(store), first.seq)
    assert commit(log, 60).seq == 4
    assert first.seq in log.history.pinned


@pytest.mark.parametrize("take", [marks.retire, marks.quarantine])
def test_a_parent_that_went_away_since_planning(store, log, take):
    parent, planned_at = commit(log, 40), log.last_seq
    if take is marks.retire:
        commit(log, 50)  # the newest cannot be retired
    take(new_log(store), parent.seq)
    with pytest.raises(ParentRetired, match="Save it in full") as caught:
        commit(log, 60, parent=parent.seq, references=[parent.seq], planned_at=planned_at)
    assert caught.value.parent == parent.seq
    assert commit(log, 60, parent=parent.seq).record.references == ()


def test_an_elder_that_went_away_before_planning_is_kept_by_the_parent(store, log):
    elder = commit(log, 40)
    parent = commit(log, 60, parent=elder.seq, references=[elder.seq])
    marks.retire(new_log(store), elder.seq)
    log.refresh()
    both = [elder.seq, parent.seq]
    assert commit(log, 80, parent=parent.seq, references=both).record.references == (2, 3)
    with pytest.raises(ParentRetired):
        commit(log, 90, parent=parent.seq, references=both, planned_at=3)


def test_only_files_of_the_parent_may_be_referred_to(log):
    stranger, parent = commit(log, 40), commit(log, 60)
    with pytest.raises(CommitRefused, match="only those of its parent"):
        commit(log, 80, parent=parent.seq, references=[stranger.seq])
    with pytest.raises(CommitRefused, match="only those of its parent None"):
        commit(log, 80, references=[stranger.seq])


# Lost answers


def test_a_lost_answer_is_resolved_by_the_same_create(store, log):
    store.fates = ["lost"]
    assert commit(log, 40).seq == 2
    store.fates = ["dropped", "dropped"]
    assert commit(log, 60).seq == 3
    first, second, third = store.created[-3:]
    assert first == second == third
    assert log.pending is None


def test_an_outcome_that_stays_unknown(store, log):
    store.fates = ["dropped"] * 100
    with pytest.raises(CommitUnknown, match="a40") as caught:
        commit(log, 40)
    assert (caught.value.attempt, caught.value.step) == ("a40", 40)
    assert log.pending.attempt == "a40"
    with pytest.raises(CommitRefused, match="commit record is still unknown"):
        commit(log, 60)
    assert {key for key, _ in store.created[1:]} == {log_key(2)}
    store.fates = []
    assert commit(log, 60).seq == 3
    assert commit(log, 40).seq == 2


def test_a_late_landing_is_found_by_a_refresh(store, log):
    store.fates = ["dropped"] * 100
    with pytest.raises(CommitUnknown):
        commit(log, 40)
    key, data = store.created[-1]
    store.fates = []
    store.create(key, data)
    assert log.refresh().newest().record.attempt == "a40"
    assert log.pending is None


def test_unknown_until_a_successor_took_the_number(store, log):
    store.fates = ["dropped"] * 100
    with pytest.raises(CommitUnknown):
        commit(log, 40)
    store.fates = []
    rules.open_run(new_log(store), incarnation="second")
    with pytest.raises(Fenced):
        commit(log, 40)
    assert log.pending is None


def test_a_refusal_after_a_lost_answer_is_still_unknown(store, log):
    store.fates = ["lost", *["denied"] * 100]
    with pytest.raises(CommitUnknown, match="denied"):
        commit(log, 40)
    store.fates = []
    assert commit(log, 40).seq == 2


def test_a_refusal_alone_is_certain(store, log):
    store.fates = ["denied"]
    with pytest.raises(StorageDenied):
        commit(log, 40)
    assert log.pending is None
    assert commit(log, 60).seq == 2


def test_a_taken_number_that_cannot_be_read_is_unknown(store, log):
    marks.pin(new_log(store), commit(log, 40).seq)
    store.unreadable = 3
    assert commit(log, 60).seq == 4
    store.unreadable = 1000
    store.create(log_key(5), b"x")
    with pytest.raises(CommitUnknown) as caught:
        commit(log, 80)
    assert isinstance(caught.value.__cause__.__cause__, KeyExists)


def test_an_interrupted_create_is_unknown(store, log, monkeypatch):
    def interrupted(key, data):
        PosixStore.create(store, key, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "create", interrupted)
    with pytest.raises(KeyboardInterrupt):
        commit(log, 40)
    monkeypatch.undo()
    assert log.pending.attempt == "a40"
    assert commit(log, 60).seq == 3


def test_a_lost_open_is_found_by_its_incarnation(store, log):
    successor = new_log(store)
    store.fates = ["lost"] * 1
    assert rules.open_run(successor, incarnation="second").generation == 2
    store.fates = ["dropped"] * 100
    with pytest.raises(OutcomeUnknown):
        rules.open_run(successor, incarnation="third")
    store.fates = []
    assert rules.open_run(successor, incarnation="third").generation == 3
    assert successor.last_seq == 3


# Operators


def test_what_the_run_needs_is_not_retired(store, log):
    first, newest = commit(log, 40), commit(log, 60)
    marks.pin(log, first.seq, label="best")
    with pytest.raises(RetireRefused, match="newest") as caught:
        marks.retire(log, newest.seq)
    assert (caught.value.target, caught.value.step) == (newest.seq, 60)
    with pytest.raises(RetireRefused, match="pinned"):
        marks.retire(log, first.seq)
    successor = new_log(store)
    rules.open_run(successor, incarnation="second")
    commit(successor, 80, generation=2)
    with pytest.raises(RetireRefused, match="resumed from it"):
        marks.retire(log, newest.seq)
    marks.unpin(log, first.seq)
    assert first.seq in marks.retire(log, first.seq).history.retired


def test_protection_is_checked_again_at_each_number(store, log, monkeypatch):
    commit(log, 40)
    commit(log, 60)
    operator = new_log(store)
    create = store.create

    def pinned_meanwhile(key, data):
        monkeypatch.undo()
        marks.pin(new_log(store), 2)
        create(key, data)

    monkeypatch.setattr(store, "create", pinned_meanwhile)
    with pytest.raises(RetireRefused, match="pinned"):
        marks.retire(operator, 2)
    assert operator.history.retired == {}


def test_a_retire_gives_the_history_to_mark_from(store, log):
    commit(log, 40)
    commit(log, 60)
    retired = marks.retire(log, 2, reason="policy")
    assert retired.history.last_seq == retired.seq == 4
    assert list(retired.history.live_commits()) == [3]


@pytest.mark.parametrize("verb", [marks.retire, marks.pin, marks.quarantine, marks.unpin])
def test_operators_name_checkpoints_that_exist(log, verb):
    commit(log, 40)
    commit(log, 60)
    marks.retire(log, 2)
    for target in (1, 2, 99):
        with pytest.raises(CheckpointNotFound, match=f"no checkpoint {target}"):
            verb(log, target)


def test_unpin_wants_a_pin(log):
    commit(log, 40)
    with pytest.raises(ConfigurationError, match="not pinned"):
        marks.unpin(log, 2)


def test_a_quarantined_checkpoint_is_not_resumed_from(store, log):
    commit(log, 40)
    damaged = commit(log, 60)
    marks.quarantine(log, damaged.seq, reason="digest", generation=1)
    assert rules.open_run(new_log(store), incarnation="second") == (2, 2)
