"""What ranks of stock DCP wrote together, and what ranks read of what we wrote."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dcp_resume.interop import Format
from tests.interop.peers import as_bytes, assert_equal, give_out, load_run, take_in

pytestmark = pytest.mark.ranks

PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "copies": [Replicate()]}


def whole() -> dict[str, torch.Tensor]:
    numbers = torch.arange(77, dtype=torch.float32).reshape(7, 11)
    return {name: numbers * k for k, name in enumerate(PLACEMENTS, 1)}


def spread(state):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    return {name: distribute_tensor(state[name], mesh, PLACEMENTS[name]) for name in state}


def save_stock(place: str) -> None:
    dcp.save({"model": spread(whole())}, checkpoint_id=place)


def load_stock(place: str) -> dict[str, bytes]:
    state = {"model": spread({name: torch.zeros_like(t) for name, t in whole().items()})}
    dcp.load(state, checkpoint_id=place)
    return {name: as_bytes(tensor.full_tensor()) for name, tensor in state["model"].items()}


def test_dcp_of_ranks_to_us(ranks, tmp_path):
    for world_size in (1, 2):
        place, run = tmp_path / f"dcp-{world_size}", tmp_path / f"run-{world_size}"
        ranks.run(save_stock, world_size, str(place))
        take_in(place, run)
        assert_equal(load_run(run, {"model": whole()})["model"], whole())
        give_out(run, tmp_path / f"again-{world_size}", Format.DCP)
        for found in ranks.run(load_stock, 2, str(tmp_path / f"again-{world_size}")):
            assert found == {name: as_bytes(tensor) for name, tensor in whole().items()}
