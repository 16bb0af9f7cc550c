"""What the flags of ``examples/train.py`` do: where it saves, from where it goes on, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcp_resume import CheckpointManager, LoadOptions
from tests.support.training import train_rank

TRAINER = Path(__file__).parents[2] / "examples" / "train.py"
SMALL = "--sequence_length 16 --batch_size 2 --total_batch_size 64 --warmup 3"


def steps_trained(command):
    """Train in this rank; the step at the end."""
    return train_rank(f"{SMALL} {command}").progress.step


def losses_in(path):
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines())}


def steps_in(run):
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def run_program(directory, flags):
    """What the program says as the only rank of a job, started in a directory."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, str(TRAINER), *SMALL.split(), *flags.split()],
        cwd=directory,
        env=os.environ | place,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_01_06_without_load_it_starts_from_scratch_and_without_save_it_writes_nothing(tmp_path):
    first, *_, last = run_program(tmp_path, "--num_iteration 2").stdout.splitlines()

    assert "starting from scratch" in first
    assert last.startswith("step    2/2")
    assert list(tmp_path.iterdir()) == []


def test_37_it_says_what_it_saved_and_from_which_place_in_the_data_it_goes_on(tmp_path):
    saving = run_program(tmp_path, "--num_iteration 2 --save run --save_interval 2")
    loading = run_program(tmp_path, "--num_iteration 3 --load run")

    [committed] = [line for line in saving.stderr.splitlines() if "CheckpointCommitted" in line]
    assert str(tmp_path / "run") in committed
    assert "duration_s=" in committed
    first, *steps = loading.stdout.splitlines()
    assert first.startswith("resumed from step 2 of run, after 8 samples; saved by 1 rank(s), ")
    assert [step.split("  loss")[0] for step in steps] == ["step    3/3"]


@pytest.fixture(scope="module")
def eight_steps(ranks, tmp_path_factory):
    """A run of 8 steps that saves every third."""
    root = tmp_path_factory.mktemp("eight-steps")
    save = f"--save {root}/run --save_interval 3 --max_checkpoint_keep 0"
    command = f"--num_iteration 8 {save} --losses {root}/losses.jsonl"
    assert ranks.run(steps_trained, 1, command) == [8]
    return root


@pytest.mark.ranks
def test_02_03_it_saves_at_multiples_of_the_interval_and_at_the_last_step(eight_steps):
    assert steps_in(eight_steps / "run") == [3, 6, 8]


@pytest.mark.ranks
def test_05_it_goes_on_at_the_next_step_and_stops_at_the_last(ranks, eight_steps, tmp_path):
    command = f"--load {eight_steps}/run --load_step 6 --losses {tmp_path}/losses.jsonl"

    assert ranks.run(steps_trained, 1, f"--num_iteration 10 {command}") == [10]

    losses, before = losses_in(tmp_path / "losses.jsonl"), losses_in(eight_steps / "losses.jsonl")
    assert list(losses) == [7, 8, 9, 10]
    assert [losses[step] for step in (7, 8)] == [before[step] for step in (7, 8)]
    assert steps_in(eight_steps / "run") == [3, 6, 8]  # no --save: it wrote nothing


KINDS = {
    "replicas": "",
    "sharded optimizer state": "--data_parallel fsdp",
    "tensor": "--tensor_parallel 2",
    "tensor and sequence": "--tensor_parallel 2 --sequence_parallel",
    "pipeline": "--pipeline_parallel 2",
    "virtual pipeline": "--pipeline_parallel 2 --virtual_pipeline_parallel 2",
}


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_32_it_saves_and_resumes_under_each_kind_of_parallelism(ranks, tmp_path, kind):
    """Each alone, on two ranks; number 31 mixes them on eight.

    Moments that ``ZeroRedundancyOptimizer`` deals out are in tests/ranks/test_wrappers.py.
    """
    common = f"{KINDS[kind]} --dropout 0.1 --num_iteration 6"
    save = f"--save {tmp_path}/run --save_interval 3 --losses {tmp_path}/whole.jsonl"
    load = f"--load {tmp_path}/run --load_step 3 --losses {tmp_path}/resumed.jsonl"

    for command in (save, load):
        assert ranks.run(steps_trained, 2, f"{common} {command}") == [6, 6]

    whole, resumed = (losses_in(tmp_path / name) for name in ("whole.jsonl", "resumed.jsonl"))
    assert resumed == {step: whole[step] for step in (4, 5, 6)}


@pytest.mark.ranks
def test_34_initial_weights_come_from_a_file_that_no_checkpoint_needs(ranks, tmp_path):
    common = "--model llama3 --learning_rate 0 --save_interval 1"
    ranks.run(steps_trained, 1, f"{common} --num_iteration 1 --save {tmp_path}/random")
    [catalog] = (tmp_path / "random").glob("step-*/*/catalog.json")
    model = [e for e in json.loads(catalog.read_text())["tensors"] if e["part"] == "model"]
    given = {e["fqn"].removeprefix("model."): torch.rand(e["global_shape"]) for e in model}
    save_file(given, tmp_path / "weights.safetensors")

    begin = f"--num_iteration 1 --hf_weights {tmp_path}/weights.safetensors --save {tmp_path}/run"
    ranks.run(steps_trained, 1, f"{common} {begin}")
    (tmp_path / "weights.safetensors").unlink()
    go_on = f"--num_iteration 2 --load {tmp_path}/run --save {tmp_path}/run"
    assert ranks.run(steps_trained, 1, f"{common} {go_on}") == [2]

    for step in (1, 2):
        found = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
        with CheckpointManager(tmp_path / "run") as checkpoints:
            checkpoints.load({"model": found}, step, options=LoadOptions(parts=("model",)))
        assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
