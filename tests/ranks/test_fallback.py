"""Resuming from damage on several ranks: all fall back alike, and only from proven damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.errors import DamageDisputed, DcpResumeError, RankErrors
from dcp_resume.events import CheckpointSkipped, subscribe
from tests.support.damage import flip

pytestmark = pytest.mark.ranks

WORLD_SIZE = 3
STEPS = (10, 20, 30)
SETTINGS = Settings(mode=SaveMode.BLOCKING, deadline_s=60.0)


def state_at(step: int) -> dict[str, Any]:
    """A shard a rank, so that each rank reads a file of its own."""
    rank = dist.get_rank()
    return {"model": {f"layers.{rank}": torch.arange(50.0) + 1000 * step + rank}, "step": step}


def is_at(state: dict[str, Any], step: int) -> bool:
    name = f"layers.{dist.get_rank()}"
    is_tensor_exact = torch.equal(state["model"][name], state_at(step)["model"][name])
    return is_tensor_exact and state["step"] == step


def save_steps(root: str) -> None:
    with CheckpointManager(root, SETTINGS) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_at(step))


def resume(roots: list[str]) -> Any:
    """What this rank got through its own root: error or step, exactness, skipped, steps left."""
    state, skipped = state_at(0), []
    unsubscribe = subscribe(
        lambda e: skipped.append(e.step) if isinstance(e, CheckpointSkipped) else None
    )
    found: DcpResumeError | int
    with CheckpointManager(roots[dist.get_rank()], SETTINGS) as checkpoints:
        try:
            result = checkpoints.resume(state)
            assert result is not None
            found = result.step
        except DcpResumeError as error:
            found = error
        unsubscribe()
        is_exact = isinstance(found, int) and is_at(state, found)
        return found, is_exact, skipped, checkpoints.steps()


def data_file(root: Path, step: int, rank: int) -> Path:
    (path,) = root.glob(f"step-{step:08}/*/shard-{rank + 1:05}-model-*")
    return path


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    ranks.run(save_steps, WORLD_SIZE, str(root))
    return root


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def damage_one_block(run: Path) -> None:
    flip(data_file(run, 30, 1), -1)


def damage_two_checkpoints(run: Path) -> None:
    damage_one_block(run)
    data_file(run, 20, 2).unlink()


def damage_a_document(run: Path) -> None:
    flip(next(run.glob("step-00000030/*/catalog.json")), 40)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(damage_one_block, 20), (damage_two_checkpoints, 10), (damage_a_document, 20)],
)
def test_all_ranks_fall_back_to_the_same_older_checkpoint(
    ranks, run, damage: Callable[[Path], None], expected: int
):
    damage(run)

    found = ranks.run(resume, WORLD_SIZE, [str(run)] * WORLD_SIZE)

    skipped = [step for step in (30, 20) if step > expected]
    left = [step for step in STEPS if step <= expected]
    assert found == [(expected, True, skipped, left)] * WORLD_SIZE


def view_of(run: Path, view: Path) -> Path:
    """The same run as seen from another host, whose files a test may change.

    Opened by ``as_seen``: below a root on disk no link is followed, and one log must serve all.
    """
    shutil.copytree(run, view, ignore=shutil.ignore_patterns("log"))
    (view / "log").symlink_to(run / "log")
    return view


def as_seen(view: Path) -> str:
    """The URL of a view, through fsspec's own local file system, which follows links."""
    return f"local://{view}"


def corrupt(path: Path) -> None:
    flip(path, -1)


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to(
        path.name
    )  # to itself: the system refuses to open it, and does not say "absent"


@pytest.mark.parametrize("harm", [corrupt, os.unlink])
def test_damage_that_one_host_alone_sees_gives_nothing_up(ranks, run, tmp_path, harm):
    """A stale mount or bad memory of one host must not cost the steps since the older one."""
    view = view_of(run, tmp_path / "view")
    harm(data_file(view, 30, 1))

    found = ranks.run(resume, WORLD_SIZE, [str(run), as_seen(view), str(run)])

    for error, _, skipped, steps in found:
        assert isinstance(error, DamageDisputed)
        assert (error.step, error.ranks) == (30, (0, 2))
        assert [problem.where.rpartition("/")[2][:11] for problem in error.problems] == [
            "shard-00002"
        ]
        assert skipped == []
        assert steps == list(STEPS)
    assert (
        ranks.run(resume, WORLD_SIZE, [str(run)] * WORLD_SIZE)
        == [(30, True, [], list(STEPS))] * WORLD_SIZE
    )


def test_a_store_that_fails_on_one_rank_is_no_damage(ranks, run, tmp_path):
    view = view_of(run, tmp_path / "view")
    make_unreadable(data_file(view, 30, 1))

    found = ranks.run(resume, WORLD_SIZE, [str(run), as_seen(view), str(run)])

    for error, _, skipped, steps in found:
        assert isinstance(error, RankErrors)
        assert "StorageError" in error.errors[1]
        assert skipped == []
        assert steps == list(STEPS)
