"""``plan``: what ranks would read, held against what they do read."""

from __future__ import annotations

import pytest
import torch

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.events import LoadFinished, subscribe

ROWS, COLUMNS = 64, 32


@pytest.fixture
def run(tmp_path):
    state = {"model": {"w": torch.zeros(ROWS, COLUMNS), "b": torch.zeros(COLUMNS)}}
    with CheckpointManager(tmp_path / "run", Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.save(1, state)
    return tmp_path / "run"


@pytest.fixture
def layout(tmp_path):
    path = tmp_path / "layout.json"
    path.write_text('{"rules": [{"match": "model.w", "tp": 0}], "replicate": ["dp"]}')
    return path


def test_one_rank_reads_what_a_load_reads(run, call_json):
    _, found = call_json("plan", run, "--to", "dp=1")
    seen = []
    unsubscribe = subscribe(seen.append)
    with CheckpointManager(run) as checkpoints:
        checkpoints.load({"model": {"w": torch.ones(ROWS, COLUMNS), "b": torch.ones(COLUMNS)}})
    unsubscribe()
    (loaded,) = (event.num_bytes for event in seen if isinstance(event, LoadFinished))
    (rank,) = found["ranks"]
    assert rank["fetched_bytes"] == loaded
    assert rank["needed_bytes"] == 4 * (ROWS * COLUMNS + COLUMNS)
    assert (rank["num_files"], found["step"]) == (1, 1)


def test_each_rank_of_a_mesh_needs_its_own_rows(run, layout, call_json):
    _, found = call_json("plan", run, "--to", "dp=2,tp=4", "--layout", layout)
    assert [rank["rank"] for rank in found["ranks"]] == [*range(8)]
    assert {rank["needed_bytes"] for rank in found["ranks"]} == {4 * (16 * COLUMNS + COLUMNS)}
    assert found["unique_bytes"] == 4 * (4 * 16 * COLUMNS + COLUMNS)
    assert found["fetched_bytes"] == sum(rank["fetched_bytes"] for rank in found["ranks"])
    assert found["amplification"] == found["fetched_bytes"] / found["unique_bytes"]


def test_a_checkpoint_laid_out_for_the_mesh_is_read_without_a_byte_more(
    run, layout, tmp_path, call, call_json
):
    mesh = ["--to", "tp=4", "--layout", layout]
    call("reshard", run, tmp_path / "tp4", *mesh)
    _, before = call_json("plan", run, *mesh)
    _, after = call_json("plan", tmp_path / "tp4", *mesh)
    assert {rank["amplification"] for rank in after["ranks"]} == {1.0}
    assert all(rank["amplification"] > 1.0 for rank in before["ranks"])


def test_neighbours_that_read_alike_share_a_row(run, layout, call):
    _, out, _ = call("plan", run, "--to", "dp=2,tp=2", "--layout", layout)
    assert len([line for line in out.splitlines() if ", each" in line or line[:1].isdigit()]) <= 4
    assert "rank(s) of dp=2,tp=2" in out


def test_what_no_rule_splits_is_said(run, call, call_json):
    assert "--layout gives rules" in call("plan", run, "--to", "tp=2")[1]
    kept = call_json("plan", run, "--to", "tp=2")[1]["kept_replicated"]
    assert {item["fqn"] for item in kept} == {"model.w", "model.b"}


@pytest.mark.parametrize("mesh", ["tp=two", "tp=2,tp=2", "tp=0", ""])
def test_a_mesh_that_is_none_is_refused(run, call, mesh):
    assert call("plan", run, "--to", mesh)[0] == 2
