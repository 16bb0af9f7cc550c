"""One checkpoint under every wrapper, and in another order of parameters; each rank's own items."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from dcp_resume import CheckpointManager, RngState, SaveMode, Settings, Severity, TrainerState

pytestmark = pytest.mark.ranks

BLOCKING = Settings(mode=SaveMode.BLOCKING, deadline_s=60)
WRAPS = (
    "plain",
    "ddp",
    "fsdp1",
    "fsdp2",
    "zero",
    "compiled",
    "compiled in ddp",
    "recomputed",
    "recomputed in fsdp1",
    "recomputed in fsdp2, compiled",
    "permuted",
    "permuted in fsdp2",
)
"""Recomputed: activation checkpointing of one layer. Permuted: parameters in another order."""


class Net(nn.Module):
    def __init__(self, *, is_permuted: bool = False) -> None:
        super().__init__()
        layers = {"a": nn.Linear(8, 16), "module": nn.Linear(16, 8)}  # which wrappers use too
        for name in reversed(layers) if is_permuted else layers:
            self.add_module(name, layers[name])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(torch.tanh(self.a(x)))


class Job:
    """A model under one wrapper, and its optimizer; every rank sees the same batch."""

    def __init__(self, wrap: str, seed: int) -> None:
        torch.manual_seed(seed)
        net = Net(is_permuted="permuted" in wrap)
        if "recomputed" in wrap:
            net.a = checkpoint_wrapper(net.a)
        self.model: nn.Module = net
        if wrap == "compiled in ddp":
            self.model = torch.compile(self.model, backend="eager")
        if wrap == "zero" or "ddp" in wrap:
            self.model = DistributedDataParallel(self.model)
        elif "fsdp1" in wrap:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            self.model = FullyShardedDataParallel(
                self.model, device_mesh=mesh, use_orig_params=True, device_id=torch.device("cpu")
            )
        elif "fsdp2" in wrap:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            self.model = fully_shard(self.model, mesh=mesh)
        if wrap.endswith("compiled"):
            self.model = torch.compile(self.model, backend="eager")
        make = torch.optim.AdamW
        self.optimizer = (
            ZeroRedundancyOptimizer(self.model.parameters(), make, lr=0.01)
            if wrap == "zero"
            else make(self.model.parameters(), lr=0.01)
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optimizer}

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            loss = self.model(x).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses


def save_under(wrap: str, root: str) -> list[float]:
    job = Job(wrap, seed=0)
    job.train(range(3))
    with CheckpointManager(root, BLOCKING) as checkpoints:
        checkpoints.save(3, job.state)
    return job.train(range(3, 6))


def resume_under(wraps: list[str], roots: list[str]) -> dict[tuple[str, str], list[float]]:
    found = {}
    for root in roots:
        for wrap in wraps:
            job = Job(wrap, seed=1)
            with CheckpointManager(root, BLOCKING) as checkpoints:
                result = checkpoints.resume(job.state)
            assert result is not None
            assert result.step == 3
            found[wrap, root] = job.train(range(3, 6))
    return found


def test_53_every_wrapper_loads_what_every_other_saved(ranks, tmp_path):
    roots = {wrap: str(tmp_path / wrap) for wrap in WRAPS}
    expected = {wrap: ranks.run(save_under, 2, wrap, root)[0] for wrap, root in roots.items()}
    for losses in expected.values():
        # Where gradients are averaged over ranks that computed the same ones, nothing is rounded.
        assert losses == expected["plain"]
    for found in ranks.run(resume_under, 2, list(WRAPS), list(roots.values())):
        assert found == {(w, r): expected["plain"] for w in WRAPS for r in roots.values()}


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def own_items(root: str, seed: int) -> Any:
    rank = dist.get_rank()
    random.seed(seed + rank), np.random.seed(seed + rank), torch.manual_seed(seed + rank)
    trainer = TrainerState()
    state = {"trainer": trainer, "rng": RngState(seed=1), "x": torch.ones(3)}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        loaded = checkpoints.resume(state)
        if loaded is None:
            started = time.perf_counter()
            trainer.advance(step=1, duration_s=time.perf_counter() - started + rank)
            checkpoints.save(1, state)
    warnings = loaded.report.of(Severity.WARN) if loaded else ()
    return draw(), trainer.wall_time_s, [(w.kind, w.where) for w in warnings]


def test_48_each_rank_gets_its_own_random_numbers_back(ranks, tmp_path):
    """INFINITRAIN 48, with ranks; and what each measures for itself is rank 0's."""
    root = str(tmp_path / "run")
    first = ranks.run(own_items, 4, root, 10)
    again = ranks.run(own_items, 4, root, 90)
    assert [draws for draws, _, _ in again] == [draws for draws, _, _ in first]
    assert len({draws for draws, _, _ in first}) == 4
    assert {seconds for _, seconds, _ in again} == {first[0][1]}
    assert all(not warnings for _, _, warnings in again)


def test_on_other_ranks_random_numbers_are_derived_alike_each_time(ranks, tmp_path):
    root = str(tmp_path / "run")
    ranks.run(own_items, 4, root, 10)
    first, again = ranks.run(own_items, 2, root, 20), ranks.run(own_items, 2, root, 30)
    assert [draws for draws, _, _ in first] == [draws for draws, _, _ in again]
    assert first[0][0] != first[1][0]
    assert all(("rng", "rng") in warnings for _, _, warnings in first)
