"""The benchmark itself: every library loads what it saved, each figure beside its limit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.goals import GOALS, judge
from benchmarks.samples import Figure

LIBRARIES = ["dcp_resume", "dcp", "torch.save", "safetensors"]
pytestmark = pytest.mark.timeout(600)  # each library has processes of its own
SAVES = {"save", "async: stall", "async: durable", "lazy: stall"}
LOADS = {"load", "load 2 → 1"}


def run(arguments: str, directory: Path) -> tuple[dict[str, Any], str]:
    """What the command wrote as JSON, and what it printed."""
    result = directory / "result.json"
    command = f"-m {arguments} --json {result}"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(result.read_text()), done.stdout


@pytest.mark.ranks
def test_54_times_bytes_and_memory_stand_beside_those_of_torch_save_and_dcp(tmp_path):
    plot = tmp_path / "plot.svg"
    document, printed = run(
        "benchmarks saves loads --size tiny --repeat 1 "
        f"--libraries {' '.join(LIBRARIES)} --directory {tmp_path} --plot {plot}",
        tmp_path,
    )
    samples = document["samples"]
    assert not document["failures"]
    assert {sample["library"] for sample in samples} == set(LIBRARIES)
    ours = {s["operation"] for s in samples if s["library"] == "dcp_resume"}
    assert ours == SAVES | LOADS
    for sample in samples:
        assert sample["cost"]["seconds"] > 0
        assert sample["limit"]["seconds"] > 0
    (lost,) = (f for f in document["figures"] if f["operation"] == "lazy: training lost")
    assert lost["library"] == "dcp_resume"
    assert math.isfinite(lost["value"])
    saves = [sample for sample in samples if sample["operation"] == "save"]
    assert all(sample["cost"]["written_bytes"] > 0 for sample in saves)
    for name in LIBRARIES:
        assert f"save             {name}" in printed
        assert name in plot.read_text()
    assert list(tmp_path.glob("benchmarks-*")) == []


@pytest.mark.ranks
def test_bytes_of_second_saves_and_of_other_meshes_are_counted(tmp_path):
    document, _ = run(
        f"benchmarks incremental reads --size tiny --libraries dcp_resume --directory {tmp_path}",
        tmp_path,
    )
    rows, columns, adapters = (
        next(f["value"] for f in document["figures"] if f["operation"].startswith(name))
        for name in ("rows", "columns", "LoRA")
    )
    assert 1 <= rows < columns
    assert adapters >= 1


def test_the_coordinators_part_of_a_save_is_measured_by_number_of_ranks(tmp_path):
    saves, _ = run("benchmarks.planning --ranks 2 16 --tensors 5", tmp_path)
    small, large = [save for save in saves if save["save"] == "first"]
    assert (small["ranks"], large["ranks"]) == (2, 16)
    assert large["index_bytes"] > small["index_bytes"]


@pytest.mark.s3
def test_our_store_stands_beside_other_clients_of_s3(tmp_path):
    document, _ = run(
        f"benchmarks s3 --size tiny --repeat 1 --directory {tmp_path} --libraries dcp_resume",
        tmp_path,
    )
    samples = document["samples"]
    assert {"dcp_resume", "boto3"} <= {sample["library"] for sample in samples}
    assert {sample["operation"] for sample in samples} == {"up", "down", "save", "load"}
    payload = document["payload_bytes"]
    for sample in samples:
        assert sample["limit"]["seconds"] > 0
        is_up = sample["operation"] in ("up", "save")
        moved = sample["cost"]["written_bytes" if is_up else "read_bytes"]
        assert moved >= payload[sample["size"]]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.size} {goal.operation}")
def test_each_goal_is_met_at_its_bound_and_missed_beyond_it(goal):
    def word(value: float, library: str = "dcp_resume") -> list[str]:
        found = Figure(goal.size, goal.operation, library, goal.measure, value)
        return [verdict.word for verdict in judge([found])]

    better, worse = goal.bound * 0.9, goal.bound * 1.1
    if goal.sense.value == "≥":
        better, worse = worse, better
    assert word(goal.bound) == word(better) == ["met"]
    assert word(worse) == ["missed"]
    assert word(worse, "dcp") == []
