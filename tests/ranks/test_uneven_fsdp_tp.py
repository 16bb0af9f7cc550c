"""FSDP over tensor parallel where rows run out: stages that hold nothing, pieces of one row.

Cutting such a tensor from the outer mesh axis inwards, as the placements are written, gives other
rows than ``fully_shard`` did: here the ranks' own local tensors are the judge.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from dcp_resume import CheckpointManager
from tests.ranks.test_agreement import BLOCKING

pytestmark = pytest.mark.ranks


def build(num_rows: int, dp: int, tp: int, *, is_filled: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, num_rows))
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.arange(1.0, parameter.numel() + 1) * is_filled
            parameter.copy_(numbers.reshape(parameter.shape))
    if dp * tp > 1:
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    return model


def save(root: str, num_rows: int, dp: int, tp: int) -> None:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": build(num_rows, dp, tp, is_filled=True)})


def load(root: str, num_rows: int, dp: int, tp: int) -> bool:
    model = build(num_rows, dp, tp, is_filled=False)
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.load({"model": model})
    expected = build(num_rows, dp, tp, is_filled=True)
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    if dp * tp == 1:
        return all(torch.equal(a, b) for a, b in pairs)
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


@pytest.mark.parametrize(("num_rows", "dp", "tp"), [(9, 4, 2), (7, 4, 2), (5, 2, 4), (3, 2, 4)])
def test_rows_go_where_they_came_from(ranks, tmp_path, num_rows, dp, tp):
    ranks.run(save, dp * tp, str(tmp_path), num_rows, dp, tp)

    for other_dp, other_tp in ((dp, tp), (2, 2), (1, 1)):
        world_size = other_dp * other_tp
        found = ranks.run(load, world_size, str(tmp_path), num_rows, other_dp, other_tp)
        assert found == [True] * world_size
