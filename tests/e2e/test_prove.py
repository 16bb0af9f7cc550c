"""``dcp-resume prove`` over whole trainings: the example, and a script that forgets something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TRAINER = Path(__file__).parents[2] / "examples" / "train.py"

pytestmark = pytest.mark.torchrun

FORGETFUL = Path(__file__).parents[1] / "support" / "forgetful_trainer.py"
TINY = "--device cpu --sequence_length 16 --batch_size 2 --total_batch_size 64 --warmup 3"
FLAGS = f"{TINY} --dropout 0.1 --tensor_parallel 2 --num_iteration {{last}} --stop_at {{stop}}"
FLAGS += " --save {run} --load {run} --save_interval 1"


def prove(*words: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "dcp_resume", "prove", "--json"]
    done = subprocess.run([*command, *words], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_example_resumes_exactly_on_two_ranks(tmp_path):
    """With dropout, and an interval that keeps the stop in the straight leg too."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", str(TRAINER), *FLAGS.split()]

    code, proof = prove("--stop-at", "1", "--last", "2", "--scratch", str(tmp_path), "--", *command)

    assert (code, proof.get("verdict")) == (0, "exact"), proof
    assert [found["step_a"] for found in proof["differences"]] == [1, 2]
    final = proof["differences"][1]
    assert final["num_tensors"] > 200
    assert final["num_bytes"] > 2_000_000
    assert final["num_values"] > 450
    assert final["passed_over"] == ["trainer.lineage", "trainer.wall_time_s"]
    assert final["uncompared"] == []


def test_a_script_that_forgets_its_generators_is_told_so(tmp_path):
    command = [sys.executable, str(FORGETFUL), "{run}", "{stop}", "{last}", "rng"]

    code, proof = prove("--stop-at", "2", "--last", "3", "--scratch", str(tmp_path), "--", *command)

    assert (code, proof["verdict"]) == (5, "not exact")
    before, after = proof["differences"]
    assert before["is_equal"]
    assert after["values"][0]["fqn"] == "rng.torch"
