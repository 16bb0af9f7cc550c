"""Ranks that write only what changed: how much that is, and that any number of ranks loads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcp_resume import CheckpointManager, RngState, SaveMode, Settings, Unchanged, open_store
from dcp_resume.events import ChangesWritten, Event, subscribe
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.opening import open_checkpoint
from dcp_resume.session.verify import verify_checkpoint
from tests.support.models import LAYOUTS, Trainee, differences, whole_state

pytestmark = pytest.mark.ranks

SETTINGS = Settings(mode=SaveMode.BLOCKING, unchanged=Unchanged.REFER, deadline_s=50)
WIDTH, RANK, LAYERS = 512, 16, 4


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.base(x) + self.up(self.down(x)))


class Lora:
    """Adapters in training on a frozen model, under FSDP2."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        self.model = nn.Sequential(*(Adapted() for _ in range(LAYERS)))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)

    def step(self, number: int) -> None:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, number: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "optim": self.optimizer,
            "rng": RngState(),
            "trainer": {"step": number},
        }

    def changed_bytes(self) -> int:
        """Of adapters and their moments, over all ranks."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return 3 * sum(p.numel() * p.element_size() for p in trained)

    def whole(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}


def train_adapters(root: str) -> tuple[list[tuple[int, int]], int]:
    """Each save's written and referenced bytes on this rank; and what changed, over all ranks."""
    written: list[tuple[int, int]] = []

    def note(event: Event) -> None:
        if isinstance(event, ChangesWritten):
            written.append((event.written_bytes, event.referenced_bytes))

    unsubscribe = subscribe(note)
    lora = Lora(7)
    with CheckpointManager(root, SETTINGS) as checkpoints:
        for number in (1, 2, 3):
            lora.step(number)
            checkpoints.save(number, lora.state(number))
        expected = lora.whole()
        other = Lora(8)
        other.step(9)
        checkpoints.load(other.state(0))
        assert all(torch.equal(tensor, expected[n]) for n, tensor in other.whole().items())
    unsubscribe()
    return written, lora.changed_bytes()


def test_a_save_of_adapters_writes_little_more_than_the_adapters(ranks, tmp_path):
    outcomes = ranks.run(train_adapters, 2, str(tmp_path))

    (_, changed), frozen = outcomes[0], LAYERS * (WIDTH + 1) * WIDTH * 4
    for save in (0, 1):
        written = sum(rank[save][0] for rank, _ in outcomes)
        # The state of random numbers is each rank's own, and some 5 KiB.
        assert changed <= written <= 1.02 * (changed + 2 * 5_200), (written, changed)
        assert sum(rank[save][1] for rank, _ in outcomes) >= frozen
    store = open_store(str(tmp_path))
    for located in find_checkpoints(store, "all"):
        assert not verify_checkpoint(store, located).problems


def double(trainee: Trainee) -> None:
    """Change one tensor of many, in all its shards."""
    for fqn, tensor in trainee.tensors():
        if fqn == "model.embed.weight":
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.detach().mul_(2)


def save_on(name: str, root: str, *steps: int) -> int:
    """Resume, and double one tensor before each save; bytes that this rank refers to."""
    referenced = 0

    def note(event: Event) -> None:
        nonlocal referenced
        if isinstance(event, ChangesWritten):
            referenced += event.referenced_bytes

    unsubscribe = subscribe(note)
    trainee = LAYOUTS[name].build()
    with CheckpointManager(root, SETTINGS) as checkpoints:
        checkpoints.resume(trainee.state)
        for step in steps:
            double(trainee)
            checkpoints.save(step, trainee.state)
    unsubscribe()
    return referenced


def load_all(name: str, root: str) -> list[list[str]]:
    """What differs on this layout, by step."""
    expected, wrong = whole_state(), []
    trainee = LAYOUTS[name].build("another", num_steps=0)
    with CheckpointManager(root, SETTINGS) as checkpoints:
        for step in checkpoints.steps():
            checkpoints.load(trainee.state, step)
            doubled = {"model.embed.weight": expected["model.embed.weight"] * 2**step}
            wrong.append(differences(trainee, {**expected, **doubled}))
            trainee.scramble()
    return wrong


def test_other_numbers_of_ranks_load_it_and_go_on_from_it(ranks, tmp_path):
    root = str(tmp_path)
    assert min(ranks.run(save_on, 4, "fsdp2_tp2", root, 1, 2, 3)) > 0
    ranks.run(save_on, 4, "fsdp2_tp2", root, 4, 5)  # resumes: nothing is remembered

    for name in ("single", "fsdp2", "fsdp4"):
        found = ranks.run(load_all, LAYOUTS[name].world_size, name, root)
        assert found == [[[]] * 5] * len(found), name

    assert min(ranks.run(save_on, 2, "fsdp2", root, 6, 7, 8)) > 0
    assert ranks.run(load_all, 4, "fsdp2_tp2", root) == [[[]] * 8] * 4
    store = open_store(root)
    for located in find_checkpoints(store, "all"):
        assert not verify_checkpoint(store, located).problems
    (newest,) = find_checkpoints(store, "latest")
    opened = open_checkpoint(store, newest.prefix, newest.manifest)
    assert {file.base for file in opened.catalog.files} != {"self"}
