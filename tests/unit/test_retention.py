"""``max_checkpoint_keep``: what goes after a commit, and what never goes."""

from __future__ import annotations

import pytest
import torch

from dcp_resume import CheckpointManager, SaveMode, Settings, events
from dcp_resume.events import CheckpointRetired, RetentionFailed
from dcp_resume.session.commit import pin, quarantine

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
        assert steps_on_disk(tmp_path) == [2, 4]
        checkpoints.save(5, STATE)
        assert steps_on_disk(tmp_path) == [2, 5]
        assert checkpoints.load(STATE, 2).step == 2


def test_pinned_ones_stay_and_damaged_ones_do_not_count(tmp_path):
    with keeping(tmp_path, 2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE)
        log = checkpoints._log
        seqs = {record.step: seq for seq, record in checkpoints.history().commits.items()}
        pin(log, seqs[1])
        quarantine(log, seqs[2])
        for step in (3, 4):
            checkpoints.save(step, STATE)
    assert steps_on_disk(tmp_path) == [1, 2, 4]


def test_50_an_attempt_that_did_not_commit_does_not_count(tmp_path):
    with keeping(tmp_path, 2) as checkpoints:
        checkpoints.save(1, STATE)
        litter = tmp_path / "step-00000009" / ("f" * 16)
        litter.mkdir(parents=True)
        (litter / "manifest.json").write_text("{}")
        checkpoints.save(2, STATE)
        assert checkpoints.steps() == [1, 2]


def test_what_cannot_be_swept_is_said_and_the_save_stands(tmp_path):
    seen = []
    unsubscribe = events.subscribe(seen.append)
    try:
        with keeping(tmp_path, 1) as checkpoints:
            checkpoints.save(1, STATE)
            [manifest] = tmp_path.glob("step-00000001/*/manifest.json")
            manifest.write_text("{")
            checkpoints.save(2, STATE)
            assert checkpoints.steps() == [2]
            checkpoints.save(3, STATE)
    finally:
        unsubscribe()
    failed = [event for event in seen if isinstance(event, RetentionFailed)]
    retired = [event for event in seen if isinstance(event, CheckpointRetired)]
    assert [event.step for event in failed] == [1]
    assert [event.step for event in retired] == [2]
    assert retired[0].num_bytes >= 4000
