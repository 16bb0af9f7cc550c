"""torchtitan's own trainer on two ranks: cut, gone on, and moved over from its own checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dcp_resume import CheckpointManager, open_store
from dcp_resume.interop import (
    ExportOptions,
    Format,
    ImportOptions,
    export_checkpoint,
    import_checkpoint,
    locate_source,
)
from dcp_resume.session.finding import find_checkpoints
from tests.support.free_ports import free_ports

MISSING = [name for name in ("torchtitan", "triton") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(MISSING), reason=f"{MISSING} not installed; 1.7 GB: see docs/how-to/torchtitan.md"
    ),
]
REPOSITORY = Path(__file__).parents[2]
STEPS = 6


@dataclass
class Jobs:
    """Jobs of one directory."""

    root: Path

    def run(self, name: str, *, folder: str | None = None, **options: Any) -> Outcome:
        """Run a job to its end."""
        losses = self.root / f"{name}.losses"
        told = {
            "folder": str(self.root / (folder or name)),
            "losses": str(losses),
            "dump": str(self.root / f"{name}-dump"),
            "steps": STEPS,
            **options,
        }
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_ports(1)[0]),
            "WORLD_SIZE": "2",
        }
        command = [sys.executable, "-m", "tests.support.torchtitan_job", json.dumps(told)]
        ranks = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
        lines = losses.read_text().splitlines() if losses.exists() else []
        return Outcome(
            [rank.returncode for rank in ranks],
            "\n".join(outputs),
            dict(json.loads(line) for line in lines),
        )


@dataclass
class Outcome:
    codes: list[int]
    output: str
    losses: dict[int, str]
    """Step → loss in hexadecimal."""

    def of_whole_run(self) -> Outcome:
        assert self.codes == [0, 0], self.output
        return self


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("titan"))


@pytest.fixture(scope="module")
def whole(jobs) -> Outcome:
    """A run that nothing interrupts."""
    return jobs.run("whole", checkpoint={"interval": 2}).of_whole_run()


def test_a_run_that_is_killed_goes_on_with_bit_equal_losses(jobs, whole):
    checkpoint = {"interval": 2, "async_mode": "async", "keep_latest_k": 2}
    cut = jobs.run("cut", checkpoint=checkpoint, killed_at=5)
    assert cut.codes == [-signal.SIGKILL] * 2, cut.output
    resumed = jobs.run("resumed", folder="cut", checkpoint=checkpoint, seed=99).of_whole_run()
    assert 1 not in resumed.losses  # the save of step 4 waited for that of step 2
    assert whole.losses.keys() == set(range(1, STEPS + 1))
    assert {**cut.losses, **resumed.losses} == whole.losses
    assert resumed.losses.items() <= whole.losses.items()
    with CheckpointManager(jobs.root / "cut") as checkpoints:
        assert checkpoints.steps() == [4, 6]


def test_tensor_parallel_ranks_go_back_to_a_step_with_bit_equal_losses(jobs):
    parallelism = {"tensor_parallel_degree": 2}
    checkpoint = {"interval": 2, "async_mode": "async_with_pinned_mem"}
    first = jobs.run("tensor", checkpoint=checkpoint, parallelism=parallelism).of_whole_run()
    checkpoint["load_step"] = 2
    back = jobs.run(
        "back", folder="tensor", checkpoint=checkpoint, parallelism=parallelism, seed=99
    ).of_whole_run()
    assert back.losses == {step: first.losses[step] for step in range(3, STEPS + 1)}


def test_a_run_of_torchtitans_own_is_imported_and_goes_on_with_bit_equal_losses(jobs, whole):
    stock = jobs.run("stock", checkpoint={"interval": 2}, is_stock=True, killed_at=5)
    assert stock.codes == [-signal.SIGKILL] * 2, stock.output
    refused = jobs.run("refused", folder="stock", checkpoint={"interval": 2})
    assert 0 not in refused.codes
    assert not refused.losses
    assert "dcp-resume import" in refused.output

    source = locate_source(str(jobs.root / "stock" / "step-4"), open_store)
    target = open_store(str(jobs.root / "moved"))
    import_checkpoint(source, target, ImportOptions(loose="model", step=4))
    moved = jobs.run("moved", checkpoint={"interval": 2}, seed=99).of_whole_run()
    assert moved.losses == {step: whole.losses[step] for step in (5, 6)}


def test_a_run_goes_back_to_torchtitans_own_checkpointer_without_the_place_in_the_data(jobs, whole):
    assert whole.codes == [0, 0]
    run = open_store(str(jobs.root / "whole"))
    (located,) = find_checkpoints(run, 4)
    target = str(jobs.root / "there" / "step-4")
    parts = ("model", "optimizer", "lr_scheduler", "train_state")
    export_checkpoint(run, located, target, Format.DCP, ExportOptions(parts=parts, loose="model"))
    checkpoint = {"interval": 9, "exclude_from_loading": ["dataloader"], "load_step": 4}
    there = jobs.run("there", checkpoint=checkpoint, is_stock=True, seed=99).of_whole_run()
    here = jobs.run("here", folder="whole", checkpoint=checkpoint, seed=99).of_whole_run()
    assert there.losses == here.losses
    assert here.losses.keys() == {5, 6}


def test_a_new_run_begins_with_the_weights_of_another_and_ends_as_hugging_face_files(jobs, whole):
    assert whole.codes == [0, 0]
    checkpoint = {
        "interval": 9,
        "initial_load_path": str(jobs.root / "whole" / "step-2"),
        "last_save_model_only": True,
        "last_save_in_hf": True,
    }
    new = jobs.run("new", checkpoint=checkpoint, seed=99, steps=1).of_whole_run()
    assert new.losses.keys() == {1}
    files = list((jobs.root / "new" / "step-1").glob("*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    assert "model.embed_tokens.weight" in names
