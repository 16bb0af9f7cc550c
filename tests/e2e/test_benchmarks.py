"""The benchmark itself: every library loads what it saved, each figure beside its limit."""

import json
import subprocess
import sys

import pytest

from benchmarks.contenders import CONTENDERS

OPERATIONS = {"save", "async: stall", "async: durable", "load", "load 2 → 1"}


@pytest.mark.ranks
def test_54_times_bytes_and_memory_stand_beside_those_of_torch_save_and_dcp(tmp_path):
    result = tmp_path / "result.json"
    run = subprocess.run(
        [sys.executable, *f"-m benchmarks --size tiny --repetitions 1 --json {result}".split()],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    samples = json.loads(result.read_text())["samples"]
    assert {sample["library"] for sample in samples} == set(CONTENDERS)
    assert {s["operation"] for s in samples if s["library"] == "dcp_resume"} == OPERATIONS
    for sample in samples:
        assert sample["cost"]["seconds"] > 0
        assert sample["limit"]["seconds"] > 0
    saves = [sample for sample in samples if sample["operation"] == "save"]
    assert all(sample["cost"]["written_bytes"] > 0 for sample in saves)
    for name in CONTENDERS:
        assert f"save             {name}" in run.stdout


def test_the_coordinators_part_of_a_save_is_measured_by_number_of_ranks(tmp_path):
    result = tmp_path / "result.json"
    run = subprocess.run(
        [
            sys.executable,
            *f"-m benchmarks.planning --ranks 2 16 --tensors 5 --json {result}".split(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    saves = json.loads(result.read_text())
    small, large = [save for save in saves if save["save"] == "first"]
    assert (small["ranks"], large["ranks"]) == (2, 16)
    assert large["index_bytes"] > small["index_bytes"]


@pytest.mark.s3
def test_our_store_stands_beside_other_clients_of_s3(tmp_path):
    result = tmp_path / "result.json"
    run = subprocess.run(
        [
            sys.executable,
            *f"-m benchmarks.s3 --mebibytes 20 --repetitions 1 --json {result}".split(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    samples = json.loads(result.read_text())["samples"]
    assert {"dcp_resume", "boto3"} <= {sample["library"] for sample in samples}
    for sample in samples:
        assert sample["limit"]["cpu_seconds"] > 0
        moved = sample["cost"]["written_bytes" if sample["operation"] == "up" else "read_bytes"]
        assert moved >= 20 << 20
