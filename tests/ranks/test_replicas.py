"""What several ranks hold: compared, declared, tied, stored once, and shared out evenly."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from dcp_resume import CheckpointManager, Declarations, SaveMode, Settings
from dcp_resume.errors import RankErrors, ReplicaMismatch
from tests.ranks.test_agreement import BLOCKING, DEADLINE_S, error_of

pytestmark = pytest.mark.ranks


def catalog_of(root: Path) -> dict[str, Any]:
    (path,) = root.rglob("catalog.json")
    return json.loads(path.read_bytes())


def save_differing(root: str) -> Any:
    rank = dist.get_rank()
    state = {
        "model": {
            "same": torch.ones(3),
            "running_mean": torch.full((3,), float(rank > 1)),
            "num_batches": torch.tensor(rank),
        },
    }
    with CheckpointManager(root, BLOCKING) as checkpoints:
        return error_of(lambda: checkpoints.save(1, state))


def test_tensors_that_differ(ranks, tmp_path):
    for error in ranks.run(save_differing, 4, str(tmp_path)):
        assert isinstance(error, ReplicaMismatch)
        assert {problem.where: problem.message for problem in error.problems} == {
            "model.running_mean": "ranks [0, 2, 3] hold different values",
            "model.num_batches": "ranks [0, 1, 2, 3] hold different values",
        }
        assert "per_rank" in str(error)
        assert "from_rank" in str(error)


def save_differing_values(root: str) -> Any:
    state = {"data": {"same": 1, "position": dist.get_rank(), "name": "a"}}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        return error_of(lambda: checkpoints.save(1, state))


def test_values_that_differ(ranks, tmp_path):
    for error in ranks.run(save_differing_values, 3, str(tmp_path)):
        assert isinstance(error, ReplicaMismatch)
        assert {problem.where for problem in error.problems} == {"data.position"}
        assert any("rank 2 has 2" in problem.message for problem in error.problems)


def declared_state(rank: int) -> dict[str, Any]:
    return {
        "model": {"same": torch.ones(3), "running_mean": torch.full((2, 3), float(rank))},
        "data": {"rng": torch.arange(4) + rank, "name": f"worker {rank}", "seen": {rank, 7}},
        "trainer": {"clock": rank * 10, "step": 5},
    }


DECLARED = Settings(
    mode=SaveMode.BLOCKING,
    deadline_s=DEADLINE_S,
    declarations=Declarations(
        per_rank=("data.*",), from_rank={"model.running_*": 2, "trainer.clock": 1}
    ),
)


def save_declared(root: str) -> None:
    with CheckpointManager(root, DECLARED) as checkpoints:
        checkpoints.save(1, declared_state(dist.get_rank()))


def load_declared(root: str) -> dict[str, Any]:
    state = declared_state(9)
    with CheckpointManager(root, DECLARED) as checkpoints:
        result = checkpoints.load(state)
    return {"report": str(result.report), **state}


def as_text(state: dict[str, Any]) -> str:
    return repr(state)


def test_declared_leaves_come_back_on_the_same_ranks(ranks, tmp_path):
    ranks.run(save_declared, 3, str(tmp_path))

    found = ranks.run(load_declared, 3, str(tmp_path))

    for rank, state in enumerate(found):
        expected = declared_state(rank)
        expected["model"]["running_mean"] = torch.full((2, 3), 2.0)
        expected["trainer"]["clock"] = 10
        assert as_text({k: v for k, v in state.items() if k != "report"}) == as_text(expected)


def test_per_rank_leaves_stay_as_they_are_on_other_ranks(ranks, tmp_path):
    ranks.run(save_declared, 3, str(tmp_path))

    for state in ranks.run(load_declared, 2, str(tmp_path)):
        assert as_text(state["data"]) == as_text(declared_state(9)["data"])
        assert state["trainer"] == {"clock": 10, "step": 5}
        assert "on 2 every rank keeps its own" in state["report"]


def save_tied(root: str) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": {"embed.weight": weight, "head.weight": weight}})


def load_tied(root: str, is_tied: bool) -> list[Any]:
    first = torch.zeros(2, 3)
    second = first if is_tied else torch.zeros(2, 3)
    state = {"model": {"embed.weight": first, "head.weight": second}}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.load(state)
    loaded = state["model"]
    return [
        loaded["embed.weight"].tolist(),
        loaded["head.weight"].tolist(),
        loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr(),
    ]


def test_tied_weights_are_stored_once_and_stay_tied(ranks, tmp_path):
    ranks.run(save_tied, 2, str(tmp_path))

    kinds = {entry["fqn"]: entry["kind"] for entry in catalog_of(tmp_path)["tensors"]}
    assert kinds == {"model.embed.weight": "replicated", "model.head.weight": "alias"}
    whole = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert ranks.run(load_tied, 2, str(tmp_path), True) == [[whole, whole, True]] * 2
    assert ranks.run(load_tied, 1, str(tmp_path), False) == [[whole, whole, False]]


def tied_across_stages(rank: int, weight: torch.Tensor) -> dict[str, Any]:
    """Each end of a pipeline holds its own copy of the shared weight."""
    return {"model": {("embed.weight", "head.weight")[rank]: weight}}


def save_tied_stages(root: str) -> None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, tied_across_stages(dist.get_rank(), torch.arange(6.0).reshape(2, 3)))


def test_weights_tied_across_stages_load_into_one(ranks, tmp_path):
    ranks.run(save_tied_stages, 2, str(tmp_path))

    whole = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert ranks.run(load_tied, 1, str(tmp_path), True) == [[whole, whole, True]]


SHAPE = (2_111, 1_024)


def save_replicated(root: str, is_proved: bool) -> None:
    tensor = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE)
    small = {f"layers.{n}.bias": torch.full((n + 1,), 1.0) for n in range(9)}
    if is_proved:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        tensor = distribute_tensor(tensor, mesh, [Replicate()])
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": {"big": tensor, **small}})


def load_replicated(root: str) -> bool:
    state = {"model": {"big": torch.zeros(SHAPE)}}
    state["model"].update({f"layers.{n}.bias": torch.zeros(n + 1) for n in range(9)})
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.load(state)
    expected = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE)
    return torch.equal(state["model"]["big"], expected)


@pytest.mark.parametrize("is_proved", [True, False])
def test_46_replicas_are_written_once_and_shared_out(ranks, tmp_path, is_proved):
    ranks.run(save_replicated, 4, str(tmp_path), is_proved)

    by_rank: dict[int, int] = defaultdict(int)
    for file in catalog_of(tmp_path)["files"]:
        by_rank[file["rank"]] += file["size"]
    unique = SHAPE[0] * SHAPE[1] * 4 + 45 * 4
    assert unique < sum(by_rank.values()) < unique * 1.01
    assert len(by_rank) == 4
    assert max(by_rank.values()) <= 1.05 * sum(by_rank.values()) / 4
    assert ranks.run(load_replicated, 1, str(tmp_path)) == [True]


def save_without_rank_3(root: str) -> Any:
    mesh = init_device_mesh("cpu", (4,))
    whole = torch.arange(10.0)
    tensor = distribute_tensor(whole, mesh, [Replicate()])
    state = {"model": {"a": tensor}} if dist.get_rank() != 3 else {"model": {"a": object()}}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        return error_of(lambda: checkpoints.save(1, state))


def test_a_rank_with_another_kind_of_leaf_is_named(ranks, tmp_path):
    for error in ranks.run(save_without_rank_3, 4, str(tmp_path)):
        assert isinstance(error, RankErrors)
        assert list(error.errors) == [3]
