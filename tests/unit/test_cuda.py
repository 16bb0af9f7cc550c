"""On a CUDA device: snapshots under a racing trainer, pinned memory, and loads into device memory.

Where there is none, ``test_device_copies.py`` still proves the order of copies on a simulated one.
"""

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

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="NO CUDA DEVICE: pinned memory, real streams and loads into device memory go unproved",
)

WIDTH = 1024
CYCLES = 200_000_000
"""Of a kernel that does nothing: about 0.1 s."""


class Trainer:
    """A model with a buffer that forwards change, on the device, and its optimizer."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state: dict[str, Any] = {"model": self.model, "optim": self.optimizer}

    def step(self) -> None:
        """Queued on the device, not waited for."""
        self.model(torch.randn(64, WIDTH, device="cuda")).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[torch.Tensor]:
        moments = [s[k] for s in self.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        return [t.detach().clone() for t in [*self.model.state_dict().values(), *moments]]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", list(SaveMode), ids=lambda mode: mode.value)
def test_each_of_many_saves_has_the_state_at_its_call_while_the_trainer_races_on(tmp_path, mode):
    trainer, twin = Trainer(0), Trainer(1)
    trainer.step()
    twin.step()
    with CheckpointManager(tmp_path, settings=Settings(mode=mode)) as checkpoints:
        for step in range(1, 9):
            trainer.step()
            values = trainer.values()
            torch.cuda._sleep(CYCLES)  # what the trainer queued is still to be done
            pending = checkpoints.save(step, trainer.state)
            for _ in range(3):
                trainer.step()
            pending.result()
            checkpoints.load(twin.state, step)
            assert_equal(twin.values(), values)


def test_the_host_waits_for_no_copy_and_a_step_is_held_on_the_device():
    trainer = Trainer(0)
    trainer.step()
    weights = [p.detach() for p in trainer.model.parameters()]
    for memory in (StepMemory((), ()), step_memory(trainer.state)):
        copies = late_copies(memory)
        places = [allocate(w.nbytes, HostMemory.PINNED) for w in weights]
        values = [w.clone() for w in weights]
        torch.cuda.synchronize()
        for place in places:
            place.fill_(255)
        torch.cuda._sleep(CYCLES)
        for place, weight in zip(places, weights, strict=True):
            copies.copy(place, weight)
        copies.close()
        copies.drain()
        assert all((place == 255).all() for place in places)  # the device still sleeps
        for weight in weights:
            weight.zero_()
        copies.finish()
        found = [p.view(w.dtype).view(w.shape) for p, w in zip(places, weights, strict=True)]
        assert_equal(found, [value.cpu() for value in values])


def test_pinned_memory_has_its_own_size_and_is_let_go():
    for _ in range(3):
        buffers = [allocate((5 << 20) + 1, HostMemory.PINNED) for _ in range(4)]
        assert all(buffer.is_pinned() and buffer.numel() == (5 << 20) + 1 for buffer in buffers)
        del buffers
        gc.collect()  # a range that is still registered could not be registered again


def test_strided_and_conjugated_tensors_arrive_as_they_are_seen(tmp_path):
    wide = torch.randn(300, 200, device="cuda")
    state = {"strided": wide.t(), "conj": torch.randn(50, dtype=torch.complex64).cuda().conj()}
    with CheckpointManager(tmp_path, settings=Settings(mode=SaveMode.BACKGROUND)) as checkpoints:
        pending = checkpoints.save(1, state)
        wide_before = wide.clone()
        wide.zero_()
        pending.result()
        loaded = {"strided": torch.zeros(200, 300, device="cuda"), "conj": state["conj"].clone()}
        loaded["conj"].zero_()
        checkpoints.load(loaded, 1)
    assert torch.equal(loaded["strided"], wide_before.t())
    assert torch.equal(loaded["conj"], state["conj"])


def test_prompt_copies_leave_nothing_to_wait_for():
    copies = prompt_copies()
    copies.close()
    assert copies.are_done
    copies.finish()
