"""``SaveMode.LAZY`` under FSDP2 and DDP: the state at ``save``, while all ranks train on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.manager.step_memory import step_memory

pytestmark = pytest.mark.ranks

LAZY = Settings(mode=SaveMode.LAZY, deadline_s=60)
WIDTH = 300


def trainer(wrap: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, WIDTH)).float().square().sum().backward()
    optimizer.step()


def local(tensor: torch.Tensor) -> torch.Tensor:
    memory = tensor.detach()
    return memory.to_local() if isinstance(memory, DTensor) else memory


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = list(model.parameters())
    found += [value for state in optimizer.state.values() for value in state.values()]
    return [local(tensor).clone() for tensor in found]


def race(directory: str, wrap: str) -> dict[str, Any]:
    model, optimizer = trainer(wrap)
    state = {"model": model, "optim": optimizer}
    train(model, optimizer)
    expected = {}
    with CheckpointManager(directory, LAZY) as checkpoints:
        for step in range(1, 5):
            expected[step] = values(model, optimizer)
            checkpoints.save(step, state)
            train(model, optimizer)
        checkpoints.wait()
        wrong = []
        for step, before in expected.items():
            checkpoints.load(state, step)
            pairs = zip(values(model, optimizer), before, strict=True)
            wrong += [step for found, saved in pairs if not torch.equal(found, saved)]
    memory = step_memory(state)
    late = [memory.owner_of(local(parameter)) is not None for parameter in model.parameters()]
    return {"wrong": wrong, "late": all(late)}


@pytest.mark.parametrize("wrap", ["fsdp2 with mixed precision", "ddp"])
def test_each_lazy_save_of_two_ranks_has_the_state_at_its_call(ranks, tmp_path, wrap):
    results = ranks.run(race, 2, str(tmp_path), wrap)
    assert results == [{"wrong": [], "late": True}] * 2
