"""Real torchrun jobs that are preempted: not a step is lost, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from dcp_resume import CheckpointManager, LoadOptions
from tests.support.launched import Job, is_alive
from tests.support.preempted_job import expected_weights

pytestmark = pytest.mark.torchrun

LAST = 100_000
"""Far: a job that is not stopped runs into the test's time-out."""
GRACE_S = 200.0


def assert_whole(root, step: int) -> None:
    """The newest checkpoint is that of the step, with the weights of an undisturbed run."""
    state = {"model": {"w": torch.zeros(1024, dtype=torch.float64)}}
    with CheckpointManager(root) as checkpoints:
        assert checkpoints.load(state, options=LoadOptions(parts=("model",))).step == step
    assert torch.equal(state["model"]["w"], expected_weights(step))


def test_the_same_command_goes_on_where_the_signal_stopped_it(tmp_path):
    root = tmp_path / "run"
    command = ("--last-step", str(LAST), "--grace", str(GRACE_S), "--workers", "1")

    with Job(root, *command) as job:  # a pod: SIGTERM to its main process, SIGKILL after the grace
        job.wait_for_step(5)
        job.stop_like_a_pod(GRACE_S)
        first = job.outcome()
    assert first.exit_code == 1, first.output  # torchrun's, whatever its workers say
    assert first.codes == [75, 75], first.errors
    assert_whole(root, first.trained)

    with Job(root, *command) as job:  # one host of a job is told
        job.wait_for_step(first.trained + 3)
        os.kill(job.notes.pids[1], signal.SIGUSR1)
        second = job.outcome(GRACE_S)
    assert second.resumed == first.trained
    assert second.exit_code == 1
    assert second.codes == [75, 75], second.errors
    assert "exitcode  : 75" in second.output
    assert_whole(root, second.trained)

    last = second.trained + 5
    with Job(root, "--last-step", str(last), num_ranks=1) as job:
        third = job.outcome(GRACE_S)
    assert (third.resumed, third.trained, third.exit_code) == (second.trained, last, 0)
    assert_whole(root, last)


def test_workers_of_a_killed_torchrun_end_and_write_no_more(tmp_path):
    root = tmp_path / "run"
    with CheckpointManager(root) as checkpoints:
        with Job(root, "--last-step", str(LAST), "--save-interval", "5") as job:
            while checkpoints.latest() is None:
                job.wait_for_step(5)
                time.sleep(0.05)
            pids = job.notes.pids
            job.process.send_signal(signal.SIGKILL)
            while any(is_alive(pid) for pid in pids):
                time.sleep(0.05)
            outcome = job.outcome()
        newest = checkpoints.latest()

    assert outcome.exit_code == -signal.SIGKILL
    # The votes' store died with torchrun: they cannot agree any more, and say so.
    assert any("RankSilent" in error for error in outcome.errors), outcome.errors
    assert all(outcome.codes)
    assert newest is not None
    assert_whole(root, newest)
