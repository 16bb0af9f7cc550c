"""Loads: one report for all ranks, nothing changed where it says no, parts alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dcp_resume import CheckpointManager, LoadOptions, SaveMode, Settings, Severity, Strictness
from dcp_resume.errors import LoadRefused, RankErrors
from tests.ranks.test_agreement import BLOCKING, DEADLINE_S, error_of
from tests.support.models import LAYOUTS, differences, whole_state

pytestmark = pytest.mark.ranks


def saved() -> dict[str, Any]:
    return {
        "model": {
            "a": torch.arange(12.0).reshape(4, 3),
            "b": torch.ones(5),
            "c": torch.ones(2, dtype=torch.bfloat16),
            "d": torch.ones(1),
        },
        "data": {"epoch": 3, "name": "x"},
    }


def save_plain(root: str) -> None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(7, saved())


def unfitting() -> dict[str, Any]:
    """Rank 0 alone has another shape, rank 1 alone another dtype; both lack and add names."""
    rank = dist.get_rank()
    return {
        "model": {
            "a": torch.full((4, 3), -1.0),
            "b": torch.full((6,) if rank == 0 else (5,), -1.0),
            "c": torch.full((2,), -1.0, dtype=torch.float32 if rank == 1 else torch.bfloat16),
            "new": torch.full((1,), -1.0),
        },
        "data": {"epoch": -1, "name": torch.zeros(1), "more": -1},
    }


def values_of(state: dict[str, Any]) -> set[Any]:
    """Every number in the state."""
    leaves = [leaf for part in state.values() for leaf in part.values()]
    flat = [v for x in leaves for v in (x.flatten().tolist() if torch.is_tensor(x) else [x])]
    return set(flat)


def load_unfitting(root: str, world_size_saved: int) -> list[Any]:
    state = unfitting()
    with CheckpointManager(root, BLOCKING) as checkpoints:
        error = error_of(lambda: checkpoints.load(state))
    return [error, values_of(state)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_everything_that_does_not_fit_is_listed_on_every_rank(ranks, tmp_path, world_size):
    ranks.run(save_plain, world_size, str(tmp_path))

    found = ranks.run(load_unfitting, 2, str(tmp_path), world_size)

    (first, _), (second, _) = found
    assert isinstance(first, LoadRefused)
    assert first.problems == second.problems
    assert sorted((problem.where, problem.kind) for problem in first.problems) == [
        ("data.more", "missing"),
        ("data.name", "kind"),
        ("model.b", "shape"),
        ("model.c", "dtype"),
        ("model.d", "unexpected"),
        ("model.new", "missing"),
    ]
    assert [values for _, values in found] == [{-1.0, 0.0}] * 2


def load_leniently(root: str) -> list[Any]:
    state = {"model": {"a": torch.zeros(4, 3), "new": torch.full((1,), -1.0)}, "data": {"epoch": 0}}
    options = LoadOptions(strictness=Strictness.WARN)
    with CheckpointManager(root, BLOCKING) as checkpoints:
        report = checkpoints.load(state, options=options).report
    items = [(item.severity, item.kind, item.where) for item in report.items]
    return [report, items, torch.equal(state["model"]["a"], saved()["model"]["a"]), state["data"]]


def test_lenient_load_reports_the_same_on_every_rank(ranks, tmp_path):
    ranks.run(save_plain, 1, str(tmp_path))

    found = ranks.run(load_leniently, 2, str(tmp_path))

    report, items, is_loaded, data = found[0]
    assert found[1] == found[0]
    assert is_loaded
    assert data == {"epoch": 3}
    assert items == [
        (Severity.WARN, "missing", "model.new"),
        (Severity.WARN, "unexpected", "data.name"),
        (Severity.WARN, "unexpected", "model.b"),
        (Severity.WARN, "unexpected", "model.c"),
        (Severity.WARN, "unexpected", "model.d"),
        (Severity.OK, "topology", "topology.world_size"),
    ]
    assert report.severity is Severity.WARN


def load_with_one_bad_state(root: str) -> list[Any]:
    state = saved() if dist.get_rank() != 1 else {**saved(), "data": {"epoch": object()}}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        error = error_of(lambda: checkpoints.load(state))
        step = checkpoints.load(saved()).step
    return [error, step]


def test_state_of_one_rank_cannot_be_loaded_into(ranks, tmp_path):
    ranks.run(save_plain, 1, str(tmp_path))

    for error, step in ranks.run(load_with_one_bad_state, 3, str(tmp_path)):
        assert isinstance(error, RankErrors)
        assert list(error.errors) == [1]
        assert "data.epoch" in error.errors[1]
        assert step == 7


def save_layout(root: str, name: str) -> None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(2, LAYOUTS[name].build().state)


def refuse_with_fresh_optimizer(root: str, name: str) -> list[Any]:
    trainee = LAYOUTS[name].build("another", num_steps=0)
    with CheckpointManager(root, BLOCKING) as checkpoints:
        error = error_of(lambda: checkpoints.load({**trainee.state, "extra": {"n": 1}}))
    return [type(error), sum(len(optimizer.state) for optimizer in trainee.optimizers)]


@pytest.mark.parametrize("name", ["single", "fsdp2", "tp2"])
def test_refused_load_leaves_a_fresh_optimizer_fresh(ranks, tmp_path, name):
    world_size = LAYOUTS[name].world_size
    ranks.run(save_layout, world_size, str(tmp_path), name)

    found = ranks.run(refuse_with_fresh_optimizer, world_size, str(tmp_path), name)

    assert found == [[LoadRefused, 0]] * world_size


def load_parts(root: str, name: str, parts: tuple[str, ...]) -> list[Any]:
    trainee = LAYOUTS[name].build("another", num_steps=0)
    before = LAYOUTS[name].build("another", num_steps=0)
    settings = Settings(
        mode=SaveMode.BLOCKING, deadline_s=DEADLINE_S, load=LoadOptions(parts=parts)
    )
    with CheckpointManager(root, settings) as checkpoints:
        checkpoints.load(trainee.state)
    has_state = any(optimizer.state for optimizer in trainee.optimizers)
    wrong = {fqn.split(".")[0] for fqn in differences(trainee, whole_state())}
    kept = {fqn: t for fqn, t in before.tensors() if fqn.startswith("model")}
    unchanged = all(_same(tensor, kept[fqn]) for fqn, tensor in trainee.tensors() if fqn in kept)
    return [wrong, has_state, unchanged]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in (a, b)]
    return torch.equal(*locals_)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("model",), [{"optim"}, False, False]),
        (("optim",), [{"model"}, True, True]),
        (("model", "optim"), [set(), True, False]),
    ],
)
def test_parts_alone(ranks, tmp_path, parts, expected):
    ranks.run(save_layout, 4, str(tmp_path), "tp4")

    assert ranks.run(load_parts, 2, str(tmp_path), "fsdp2", parts) == [expected] * 2


Make = Callable[[], dict[str, Any]]


def sharded_on(dim: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(30.0 * 7).reshape(30, 7)
    return {"model": {"w": distribute_tensor(whole, mesh, [Shard(dim)])}}


def save_sharded(root: str) -> None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, sharded_on(0))


def load_sharded(root: str, dim: int) -> list[Any]:
    state = sharded_on(dim)
    tensor = state["model"]["w"]
    expected = tensor.full_tensor()
    tensor.to_local().zero_()
    with CheckpointManager(root, BLOCKING) as checkpoints:
        result = checkpoints.load(state)
    own = tensor.to_local().nbytes
    return [torch.equal(tensor.full_tensor(), expected), result.needed_bytes == own]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_wants_its_own_bytes_only(ranks, tmp_path, dim, world_size):
    ranks.run(save_sharded, 4, str(tmp_path))

    found = ranks.run(load_sharded, world_size, str(tmp_path), dim)

    assert found == [[True, True]] * world_size
