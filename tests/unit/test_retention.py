"""Retention after a commit: what goes, what never goes, and what a failure leaves."""

from __future__ import annotations

import os
import time

import pytest
import torch

from dcp_resume import (
    CheckpointManager,
    KeepAll,
    KeepBest,
    KeepLast,
    SaveMode,
    Settings,
    TrainerState,
    events,
)
from dcp_resume.errors import ConfigurationError, StorageDenied
from dcp_resume.events import CheckpointRetired, LitterRemoved, RetentionFailed
from dcp_resume.session.marks import pin, quarantine, retire
from dcp_resume.storage.posix_store import PosixStore

STATE = {"x": torch.ones(1000)}


def keeping(root, keep, mode=SaveMode.BLOCKING):
    return CheckpointManager(root, Settings(mode=mode, max_checkpoint_keep=keep))


def steps_on_disk(root):
    return sorted({int(p.parts[-3].split("-")[1]) for p in root.glob("step-*/*/manifest.json")})


@pytest.mark.parametrize("mode", SaveMode)
@pytest.mark.parametrize(("keep", "left"), [(3, [90, 100, 110]), (1, [110]), (0, None)])
def test_07_at_most_so_many_remain_and_the_oldest_go(tmp_path, keep, left, mode):
    """INFINITRAIN 7; numbers, not names, are compared: 100 is younger than 90."""
    every = list(range(10, 120, 10))
    with keeping(tmp_path, keep, mode) as checkpoints:
        for step in every:
            checkpoints.save(step, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == (left or every)
    assert steps_on_disk(tmp_path) == (left or every)
    kept = {path.parent for path in tmp_path.glob("step-*/*/manifest.json")}
    files = [path for path in tmp_path.glob("step-*/**/*") if path.is_file()]
    assert {path.parent for path in files} == kept


def test_50_the_resume_source_and_the_newest_are_never_retired(tmp_path):
    """INFINITRAIN 50."""
    with keeping(tmp_path, 0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, STATE)
    with keeping(tmp_path, 1) as checkpoints:
        checkpoints.resume(STATE, 2)
        checkpoints.save(4, STATE)
        checkpoints.wait()
        assert steps_on_disk(tmp_path) == [2, 4]
        checkpoints.save(5, STATE)
        checkpoints.wait()
        assert steps_on_disk(tmp_path) == [2, 5]
        assert checkpoints.load(STATE, 2).step == 2


def test_pinned_ones_stay_and_damaged_ones_do_not_count(tmp_path):
    with keeping(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE)
        checkpoints.wait()
        log = checkpoints._log
        seqs = {record.step: seq for seq, record in checkpoints.history().commits.items()}
        pin(log, seqs[1])
        quarantine(log, seqs[2])
        for step in (3, 4, 5):
            checkpoints.save(step, STATE)
    assert steps_on_disk(tmp_path) == [1, 2, 4, 5]


def test_50_an_attempt_that_did_not_commit_does_not_count(tmp_path):
    with keeping(tmp_path, 2) as checkpoints:
        checkpoints.save(1, STATE)
        litter = tmp_path / "step-00000009" / ("f" * 16)
        litter.mkdir(parents=True)
        (litter / "manifest.json").write_text("{}")
        checkpoints.save(2, STATE)
        assert checkpoints.steps() == [1, 2]


@pytest.fixture
def seen():
    found = []
    unsubscribe = events.subscribe(found.append)
    yield found
    unsubscribe()


def of_kind(seen, kind):
    return [event for event in seen if isinstance(event, kind)]


def test_a_damaged_checkpoint_is_deleted_too(tmp_path, seen):
    with keeping(tmp_path, 1) as checkpoints:
        checkpoints.save(1, STATE)
        [manifest] = tmp_path.glob("step-00000001/*/manifest.json")
        manifest.write_text("{")
        checkpoints.save(2, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == [2]
    assert not (tmp_path / "step-00000001").exists()
    assert of_kind(seen, RetentionFailed) == []
    assert [event.step for event in of_kind(seen, CheckpointRetired)] == [1]
    assert of_kind(seen, CheckpointRetired)[0].num_bytes >= 4000


def test_what_cannot_be_deleted_is_said_and_tried_again(tmp_path, seen, monkeypatch):
    """The store refuses; the save stands, and the next commit's pass finishes the deletion."""
    delete = PosixStore.delete

    def refuse(store, keys):
        kept = list(keys)
        if any(key.endswith("manifest.json") for key in kept):
            raise StorageDenied("not yours", url=store.url, key=kept[0])
        delete(store, kept)

    with keeping(tmp_path, 1) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.wait()
        monkeypatch.setattr(PosixStore, "delete", refuse)
        checkpoints.save(2, STATE)
        checkpoints.wait()
        assert checkpoints.steps() == [2]
        assert steps_on_disk(tmp_path) == [1, 2]
        assert {event.step for event in of_kind(seen, RetentionFailed)} == {1}
        assert of_kind(seen, CheckpointRetired) == []
        monkeypatch.undo()
        checkpoints.save(3, STATE)
        checkpoints.wait()
        assert steps_on_disk(tmp_path) == [3]
    assert [event.step for event in of_kind(seen, CheckpointRetired)] == [1, 2]


def test_the_next_job_finishes_what_was_cut_off_and_removes_old_litter(tmp_path, seen):
    """The grace time is told by the store: the files' times are set, not our clock."""
    with keeping(tmp_path, 0) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, STATE)
        retire(checkpoints._log, checkpoints.history().find_step(1).seq)
    day_before = time.time() - 25 * 3600
    litter = {}
    for step, modified_s in ((8, day_before), (9, time.time())):
        litter[step] = tmp_path / f"step-{step:08d}" / "a" / "shard"
        litter[step].parent.mkdir(parents=True)
        litter[step].write_text("half")
        os.utime(litter[step], (modified_s, modified_s))
    with keeping(tmp_path, 3) as checkpoints:
        checkpoints.resume(STATE)
        checkpoints.save(4, STATE)
    assert steps_on_disk(tmp_path) == [2, 3, 4]
    assert not litter[8].exists()
    assert litter[9].exists()
    [removed] = of_kind(seen, LitterRemoved)
    assert removed.num_files >= 4
    assert removed.num_bytes > 4000


def test_both_forms_at_once_are_an_error():
    with pytest.raises(ConfigurationError, match=r"KeepLast\(3\)") as caught:
        Settings(max_checkpoint_keep=3, retention=KeepBest())
    assert caught.value.option == "retention"
    assert Settings(max_checkpoint_keep=3).retention_policy == KeepLast(3)
    assert Settings(retention=KeepBest()).retention_policy == KeepBest()
    assert Settings().retention_policy == KeepAll()


def test_a_policy_keeps_the_best_of_a_real_run(tmp_path):
    settings = Settings(mode=SaveMode.BLOCKING, retention=KeepBest("loss", "min", 2))
    trainer = TrainerState()
    with CheckpointManager(tmp_path, settings) as checkpoints:
        for step, loss in enumerate((3.0, 1.0, 2.0, 4.0, 5.0), 1):
            trainer.advance(step=step, samples=1, loss=loss)
            checkpoints.save(step, {"x": STATE["x"], "trainer": trainer})
    assert steps_on_disk(tmp_path) == [2, 3, 5]
