"""What the flags of ``examples/train.py`` do: where it saves, from where it goes on, and how."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


LAYERS, HEADS, WIDTH, VOCABULARY, PADDED, LENGTH = 4, 4, 64, 256, 384, 64
"""Of the tiny GPT-2; llm.c pads vocabularies to multiples of 128."""


def write_llmc_file(path):
    """Tensors in the order that llm.c defines; returns them under the names of the model."""
    layer = [("ln_1.weight", (WIDTH,)), ("ln_1.bias", (WIDTH,))]
    layer += [("attn.c_attn.weight", (3 * WIDTH, WIDTH)), ("attn.c_attn.bias", (3 * WIDTH,))]
    layer += [("attn.c_proj.weight", (WIDTH, WIDTH)), ("attn.c_proj.bias", (WIDTH,))]
    layer += [("ln_2.weight", (WIDTH,)), ("ln_2.bias", (WIDTH,))]
    layer += [("mlp.c_fc.weight", (4 * WIDTH, WIDTH)), ("mlp.c_fc.bias", (4 * WIDTH,))]
    layer += [("mlp.c_proj.weight", (WIDTH, 4 * WIDTH)), ("mlp.c_proj.bias", (WIDTH,))]
    order = [("wte.weight", (PADDED, WIDTH)), ("wpe.weight", (LENGTH, WIDTH))]
    order += [(f"h.{number}.{name}", shape) for name, shape in layer for number in range(LAYERS)]
    order += [("ln_f.weight", (WIDTH,)), ("ln_f.bias", (WIDTH,))]
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, 3, LENGTH, VOCABULARY, LAYERS, HEADS, WIDTH, PADDED
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"transformer.{name}": torch.rand(shape, generator=generator) for name, shape in order
    }
    data = [header.tobytes(), *(tensor.numpy().tobytes() for tensor in tensors.values())]
    path.write_bytes(b"".join(data))
    return tensors


@pytest.mark.ranks
def test_34_initial_weights_come_from_a_file_that_no_checkpoint_needs(ranks, tmp_path):
    """The model keeps q, k and v of a head together, llm.c all of q, then of k, then of v."""
    given = write_llmc_file(tmp_path / "gpt2.bin")
    save = f"--save {tmp_path}/run --save_interval 1 --learning_rate 0"
    command = f"--num_iteration 1 --llmc_filepath {tmp_path}/gpt2.bin {save}"
    ranks.run(steps_trained, 1, command)
    (tmp_path / "gpt2.bin").unlink()

    assert ranks.run(steps_trained, 1, f"--num_iteration 2 --load {tmp_path}/run") == [2]

    given["transformer.wte.weight"] = given["transformer.wte.weight"][:VOCABULARY]
    given["lm_head.weight"] = given["transformer.wte.weight"]
    found = {name: torch.zeros_like(tensor) for name, tensor in given.items()}
    with CheckpointManager(tmp_path / "run") as checkpoints:
        checkpoints.load({"model": found}, options=LoadOptions(parts=("model",)))
    for name, tensor in given.items():
        is_packed = ".c_attn." in name
        by_head = tensor.unflatten(0, (3, HEADS, -1)).transpose(0, 1) if is_packed else tensor
        assert torch.equal(found[name], by_head.reshape(tensor.shape)), name
