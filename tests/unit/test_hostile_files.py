"""Nothing that is read from storage is ever executed, whatever a bucket's writer puts there."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys

import pytest
import torch.distributed.checkpoint as dcp

from dcp_resume import CheckpointManager, Reader, errors
from tests.support.damage import NEWER, DamagedRun, changed_parts, state_at


class Bomb:
    """Unpickling it would make the file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def run(tmp_path):
    return DamagedRun(tmp_path / "run")


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "executed"


def everything_loads(run) -> None:
    """Every door, tolerant of refusal: what matters is what did not run."""
    state = state_at(0)
    with CheckpointManager(run.root) as checkpoints:
        for attempt in (checkpoints.load, checkpoints.resume):
            try:
                attempt(state)
            except errors.DcpResumeError:
                assert not changed_parts(state, 0) or attempt == checkpoints.resume
    for planner in (dcp.DefaultLoadPlanner(), None):
        with contextlib.suppress(dcp.CheckpointException):
            dcp.load(state_at(0), storage_reader=Reader(run.root), planner=planner, no_dist=True)


@pytest.mark.parametrize("name", ["manifest.json", "catalog.json", "chunk-index"])
def test_a_pickle_in_place_of_a_document_does_not_run(run, sentinel, name):
    (run.attempt() / name).write_bytes(pickle.dumps(Bomb(str(sentinel))))
    everything_loads(run)
    assert not sentinel.exists()


def test_a_pickle_in_place_of_data_or_log_does_not_run(run, sentinel):
    bomb = pickle.dumps(Bomb(str(sentinel)))
    run.data_file(3).write_bytes(bomb)
    everything_loads(run)
    run.commit_record().write_bytes(bomb)
    everything_loads(run)
    assert not sentinel.exists()


def test_stray_files_of_other_libraries_are_not_read(run, sentinel):
    for name in (".metadata", "__0_0.distcp", "data.pkl", "rank-0.pt"):
        (run.attempt() / name).write_bytes(pickle.dumps(Bomb(str(sentinel))))
    state = state_at(0)
    with CheckpointManager(run.root) as checkpoints:
        assert checkpoints.load(state).step == NEWER
    assert not changed_parts(state, NEWER)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "value",
    [
        {"$enum": ["os.path", "sep"]},
        {"$enum": ["antigravity.Fun", "FLY"]},
        {"$object": {"py/reduce": [{"py/function": "os.mkdir"}, {"py/tuple": ["x"]}]}},
        {"$dtype": "__import__('os').mkdir('x')"},
        {"$numpy": {"dtype": "O", "shape": [1], "data": "gASVAAAAAAAAAAA="}},
        {"$tuple": {"$tuple": {"$tuple": 1}}},
    ],
    ids=lambda value: next(iter(value)),
)
def test_tags_build_values_and_import_nothing(run, sentinel, value, monkeypatch):
    monkeypatch.chdir(run.root)

    def plant(manifest):
        for leaf in manifest["leaves"]:
            leaf["value"] = value

    run.edit_manifest(plant)
    modules = set(sys.modules)
    everything_loads(run)
    assert not sentinel.exists()
    assert not (run.root / "x").exists()
    assert "antigravity" not in set(sys.modules) - modules
