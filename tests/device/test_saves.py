"""Snapshots of device memory under a trainer that races on, and pinned memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.manager.step_memory import step_memory
from dcp_resume.session.copies import StepMemory
from dcp_resume.session.device_copies import late_copies, prompt_copies
from dcp_resume.session.host_memory import HostMemory, allocate
from tests.device.busy import keep_busy

WIDTH = 64


class Trainer:
    """A model with a buffer that forwards change, on the device, and its optimizer."""

    def __init__(self, device: torch.device, seed: int) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        self.device = device
        self.model = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state: dict[str, Any] = {"model": self.model, "optim": self.optimizer}

    def step(self) -> None:
        """Queued on the device, not waited for."""
        self.model(torch.randn(64, WIDTH).to(self.device)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[torch.Tensor]:
        moments = [s[k] for s in self.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        return [t.detach().cpu().clone() for t in [*self.model.state_dict().values(), *moments]]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", list(SaveMode), ids=lambda mode: mode.value)
def test_each_of_many_saves_has_the_state_at_its_call_while_the_trainer_goes_on(
    tmp_path, device, mode
):
    trainer, twin = Trainer(device, 0), Trainer(device, 1)
    trainer.step()
    twin.step()
    with CheckpointManager(tmp_path, settings=Settings(mode=mode)) as checkpoints:
        for step in range(1, 5):
            trainer.step()
            values = trainer.values()
            keep_busy(device, 1)
            pending = checkpoints.save(step, trainer.state)
            for _ in range(2):
                trainer.step()
            pending.result()
            checkpoints.load(twin.state, step)
            assert_equal(twin.values(), values)


@pytest.mark.parametrize("is_lazy", [False, True], ids=["background", "lazy"])
def test_the_host_waits_for_no_copy_and_a_step_is_held_on_the_device(device, is_lazy):
    model = nn.ParameterList([torch.full((n, 40), float(n)) for n in range(1, 20)]).to(device)
    optimizer = torch.optim.SGD(model.parameters())
    memory = step_memory({"model": model, "optim": optimizer}) if is_lazy else StepMemory((), ())
    places = [allocate(p.nbytes, HostMemory.PINNED) for p in model]
    for place in places:
        place.fill_(255)
    values = [p.detach().cpu() + 1 for p in model]
    keep_busy(device, 1)
    with torch.no_grad():
        for parameter in model:
            parameter.add_(torch.ones((), device=device))  # before the save, and not yet done
    copies = late_copies(memory)
    for place, parameter in zip(places, model, strict=True):
        copies.copy(place, parameter.detach())
    copies.close()
    assert copies.are_done is not is_lazy
    copies.drain()
    assert all((place == 255).all() for place in places)  # the device is busy
    with torch.no_grad():
        for parameter in model:
            parameter.zero_()
    copies.finish()
    found = [p.view(v.dtype).view(v.shape) for p, v in zip(places, values, strict=True)]
    assert_equal(found, values)
    assert all(not parameter.any() for parameter in model)


def test_pinned_memory_has_its_own_size_and_is_let_go(device):
    for _ in range(3):
        buffers = [allocate((5 << 20) + 1, HostMemory.PINNED) for _ in range(4)]
        assert all(buffer.is_pinned() and buffer.numel() == (5 << 20) + 1 for buffer in buffers)
        del buffers
        gc.collect()  # CUDA refuses to register a range that still is


def test_strided_and_conjugated_tensors_arrive_as_they_are_seen(tmp_path, device):
    wide, turned = torch.randn(300, 200), torch.randn(50, dtype=torch.complex64).conj()
    state = {"strided": wide.to(device).t(), "conj": turned.to(device)}
    with CheckpointManager(tmp_path, settings=Settings(mode=SaveMode.BACKGROUND)) as checkpoints:
        pending = checkpoints.save(1, state)
        state["strided"].zero_()
        pending.result()
        loaded = {
            "strided": torch.zeros(200, 300, device=device),
            "conj": torch.zeros(50, dtype=torch.complex64, device=device),
        }
        checkpoints.load(loaded, 1)
    assert torch.equal(loaded["strided"].cpu(), wide.t())
    assert torch.equal(loaded["conj"].cpu(), turned)


def test_where_nothing_is_copied_nothing_is_waited_for(device):
    copies = prompt_copies()
    copies.close()
    assert copies.are_done
    copies.finish()
