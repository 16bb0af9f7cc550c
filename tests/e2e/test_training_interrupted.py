"""The example trainer under torchrun: a rank dies, Ctrl-C, a preemption; the next start goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dcp_resume import CheckpointManager
from dcp_resume.cli.main import main
from tests.support.training import TINY, digests_after, losses_of

TRAINER = Path(__file__).parents[2] / "examples" / "train.py"
LAST = 24
PATIENCE_S = 200
"""A job that has not ended by then hangs."""


def torchrun(command):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*words, str(TRAINER), *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a group of its own, as a terminal makes
        text=True,
    )


def run_until(command, step, strike):
    """All that a job said; it is struck when it has said that it reached ``step``."""
    with torchrun(command) as job:
        try:
            said = ""
            while f"step {step:4d}/" not in said:
                line = job.stdout.readline()
                assert line, said
                said += line
            strike(job.pid)
            said += job.communicate(timeout=PATIENCE_S)[0]
        finally:
            if job.poll() is None:
                job.terminate()  # torchrun ends its ranks; killed itself, it would orphan them
    return job.returncode, said


def kill_the_last_rank(pid):
    """A lost machine, seen from the others."""
    *_, rank = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(rank), signal.SIGKILL)


def hit_ctrl_c(pid):
    os.killpg(pid, signal.SIGINT)


def end_the_job(pid):
    os.kill(pid, signal.SIGTERM)


def resumed_from(said):
    return int(re.search(r"resumed from step (\d+)", said)[1])


def steps_if_whole(run):
    """The steps of a run, each verified to the last byte."""
    with CheckpointManager(run) as checkpoints:
        steps = checkpoints.steps()
    assert [main(["verify", str(run), "--step", str(step)]) for step in steps] == [0] * len(steps)
    return steps


@pytest.mark.ranks
@pytest.mark.torchrun
def test_a_lost_rank_and_a_ctrl_c_cost_the_steps_since_the_last_save_and_a_preemption_none(
    ranks, tmp_path
):
    command = f"{TINY} --data_parallel fsdp --dropout 0.1 --num_iteration {LAST}"
    ranks.run(digests_after, 2, f"{command} --losses {tmp_path}/whole.jsonl")
    run = tmp_path / "run"
    command += f" --save {run} --load {run} --save_interval 5 --losses {tmp_path}/struck.jsonl"

    status, said = run_until(f"{command} --save_mode blocking", 7, kill_the_last_rank)
    assert status != 0
    assert "SIGKILL" in said
    assert steps_if_whole(run) == [5]

    # At step 17 no rank is behind 16: all have handed the save of 15 to the background.
    status, said = run_until(command, 17, hit_ctrl_c)
    assert status != 0
    assert resumed_from(said) == 5
    assert f"interrupted; go on with --load {run}" in said
    assert steps_if_whole(run) == [5, 10, 15]

    # Told by torchrun, the ranks save the step they are in.
    status, said = run_until(command, 17, end_the_job)
    assert status != 0
    assert resumed_from(said) == 15
    *_, stopped_at = steps_if_whole(run)
    assert stopped_at >= 17

    with torchrun(command) as job:
        said = job.communicate(timeout=PATIENCE_S)[0]
    assert job.returncode == 0, said
    assert resumed_from(said) == stopped_at
    assert steps_if_whole(run)[-1] == LAST
    assert losses_of(tmp_path / "struck.jsonl") == losses_of(tmp_path / "whole.jsonl")
