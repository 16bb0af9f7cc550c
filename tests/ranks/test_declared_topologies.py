"""A Megatron-like state goes from any topology to any other: every element, and every tie."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_resume import CheckpointManager, LoadOptions, MeshPlace, SaveMode, Settings
from tests.support.megatron import Topology, declarations, state_of, whole

pytestmark = pytest.mark.ranks

MANY = Topology(tp=2, dp=2, pp=2, chunks=2)


def manager(root: str, topology: Topology) -> CheckpointManager:
    declared = declarations(topology.place(dist.get_rank()))
    settings = Settings(mode=SaveMode.BLOCKING, deadline_s=60, declarations=declared)
    return CheckpointManager(root, settings)


def load_as_dtensors(root: str) -> list[str]:
    """Names that differ from the whole, of a model that knows nothing of declared layouts."""
    device_mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
    assert MeshPlace.of(device_mesh) == MeshPlace.numbered({"tp": 3}, dist.get_rank())
    one = state_of(Topology(), 0, is_filled=True)["model"]
    names = [name for name in one if name != "head.weight"]
    state = {
        name: distribute_tensor(torch.zeros_like(whole(name)), device_mesh, [Shard(0)])
        for name in names
    }
    options = LoadOptions(parts=("model",))
    with CheckpointManager(root, Settings(deadline_s=60, load=options)) as checkpoints:
        checkpoints.load({"model": {**state, "head.weight": state["embed.weight"]}})
    return [name for name in names if not torch.equal(state[name].full_tensor(), whole(name))]


def test_dtensors_read_what_was_declared(ranks, tmp_path):
    """Packed rows in the order of the whole, without the padding of the vocabulary."""
    ranks.run(save, 4, str(tmp_path), Topology(tp=4))
    assert ranks.run(load_as_dtensors, 3, str(tmp_path)) == [[]] * 3


def leaves(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {**state["model"], **state["optim"]["state"]}


def save(root: str, topology: Topology) -> None:
    with manager(root, topology) as checkpoints:
        checkpoints.save(7, state_of(topology, dist.get_rank(), is_filled=True))


def load(root: str, topology: Topology, resave: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of what is not this rank's piece of the whole, and what the report says."""
    rank = dist.get_rank()
    state = state_of(topology, rank, is_filled=False)
    with manager(root, topology) as checkpoints:
        report = checkpoints.resume(state).report
    with manager(resave, topology) as checkpoints:
        checkpoints.save(7, state)
    expected = leaves(state_of(topology, rank, is_filled=True))
    wrong = [name for name, t in leaves(state).items() if not torch.equal(t, expected[name])]
    if topology.pp == 1 and state["model"]["head.weight"] is not state["model"]["embed.weight"]:
        wrong.append("tie")
    return wrong, [(i.kind, i.where) for i in report.items if i.kind != "topology"]


@pytest.mark.parametrize(
    "steps",
    [
        (Topology(tp=2), Topology(tp=4), Topology(tp=2), Topology()),
        (MANY, Topology(), MANY),
        (Topology(pp=2), Topology(), Topology(pp=2, chunks=2), Topology(pp=4), Topology(tp=4)),
        (Topology(ep=4), Topology(tp=2, ep=2), Topology(tp=4)),
    ],
    ids=["tp-2-4-2-1", "8-ranks-1-8", "pp-and-virtual-stages", "ep"],
)
def test_every_element_comes_back_on_the_next_topology(ranks, tmp_path, steps):
    """INFINITRAIN 42 to 46: TP, PP, virtual stages, 8 ranks to 1 and back, with moments."""
    ranks.run(save, steps[0].world_size, str(tmp_path / "0"), steps[0])

    for number, (before, topology) in enumerate(pairwise(steps), 1):
        found = ranks.run(
            load,
            topology.world_size,
            str(tmp_path / str(number - 1)),
            topology,
            str(tmp_path / str(number)),
        )
        assert [wrong for wrong, _ in found] == [[]] * topology.world_size
        kinds = {kind for _, items in found for kind, _ in items}
        assert kinds == (set() if before.tp == topology.tp else {"padding"})
