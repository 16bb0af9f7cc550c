"""A save's copies from a device: right under every order in which a device may do its work."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from dcp_resume.errors import StateError
from dcp_resume.manager.step_memory import step_memory
from dcp_resume.session.copies import AtOnce, LateCopies, StepMemory
from dcp_resume.session.device_copies import DeviceCopies
from tests.support.simulated_device import SimulatedDevice

SEEDS = range(300)


class DeviceTrainer:
    """Weights that steps change, a buffer that forwards change, and what lies on the host.

    Work is queued on the device; ``expected`` is what each tensor holds once all of it is done.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.device = SimulatedDevice(seed)
        self.model = nn.ParameterList(
            [nn.Parameter(self.device.tensor(torch.full((n, 3), float(n)))) for n in range(1, 5)]
        )
        self.model.register_buffer("mean", self.device.tensor(torch.zeros(5)))
        self.count = torch.zeros(1)  # on the host
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.tensors = [*(p.detach() for p in self.model), self.model.mean, self.count]
        self.expected = [tensor.clone() for tensor in self.tensors]

    def change(self, number: int, amount: float) -> None:
        memory = self.tensors[number].numpy()
        self.expected[number] += amount
        self.device.trainer.add(lambda: np.add(memory, amount, out=memory))

    def forward(self) -> None:
        self.change(4, self.random.random())
        self.device.do_some_work(self.random.randrange(4))

    def step(self) -> None:
        for number in range(4):
            self.change(number, self.random.random())
            self.device.do_some_work(self.random.randrange(3))

    def memory(self) -> StepMemory:
        return step_memory({"model": self.model, "optim": self.optimizer})


def start(trainer: DeviceTrainer, memory: StepMemory) -> tuple[DeviceCopies, list[torch.Tensor]]:
    copies = DeviceCopies(LateCopies(memory), memory, trainer.device)
    places = [torch.full(t.shape, torch.nan) for t in trainer.tensors]
    for place, tensor in zip(places, trainer.tensors, strict=True):
        copies.copy(place.view(-1).view(torch.uint8), tensor)
    copies.close()
    return copies, places


def assert_are(places: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    assert all(torch.equal(p, v) for p, v in zip(places, values, strict=True))


@pytest.mark.parametrize("is_lazy", [False, True], ids=["background", "lazy"])
def test_a_snapshot_is_the_state_at_the_save_in_whatever_order_the_device_works(is_lazy):
    for seed in SEEDS:
        trainer = DeviceTrainer(seed)
        trainer.forward()
        trainer.step()
        memory = trainer.memory() if is_lazy else StepMemory((), ())
        copies, places = start(trainer, memory)
        saved = [value.clone() for value in trainer.expected]
        trainer.forward()
        is_early = trainer.random.random() < 0.3  # the files are written before the next step
        if is_early:
            copies.finish()
            assert_are(places, saved)
        copies.drain()
        trainer.step()
        trainer.forward()
        copies.finish()
        assert_are(places, saved)
        trainer.device.do_some_work(1000)
        assert_are(trainer.tensors[:5], trainer.expected[:5])  # nothing stands still for ever


def test_the_host_waits_for_no_copy_before_the_files_are_written():
    trainer = DeviceTrainer(0)
    trainer.forward()
    copies, places = start(trainer, StepMemory((), ()))
    assert copies.are_done
    copies.drain()
    assert copies.are_done
    assert all(place.isnan().all() for place in places[:5])
    assert torch.equal(places[5], trainer.count)
    copies.finish()
    assert not any(place.isnan().any() for place in places)


def test_a_late_copy_is_not_done_until_the_device_made_it_or_a_step_waits_for_it():
    trainer = DeviceTrainer(0)
    copies, places = start(trainer, trainer.memory())
    assert not copies.are_done
    trainer.device.do_some_work(1000)
    assert copies.are_done
    assert_are(places, trainer.expected)
    with torch.no_grad():
        trainer.model[2].mul_(2)  # as it now may
    copies.finish()


def test_every_stream_that_steps_waits_for_itself():
    for seed in SEEDS:
        trainer = DeviceTrainer(seed)
        copies, places = start(trainer, trainer.memory())
        saved = [value.clone() for value in trainer.expected]
        copies.drain()  # by a thread of its own, on another stream
        trainer.device.trainer = trainer.device.open_queue(torch.device("cpu"))
        copies.drain()
        trainer.step()
        copies.finish()
        assert_are(places, saved)


def test_a_change_by_something_else_than_a_step_before_the_copy_fails_the_save_by_name():
    trainer = DeviceTrainer(0)
    copies, _ = start(trainer, trainer.memory())
    with torch.no_grad():
        trainer.model[2].mul_(2)
    copies.drain()  # a step goes on
    with pytest.raises(StateError, match=r"optim\.param_groups\.0\.params\.2: changed in place"):
        copies.finish()


def test_after_it_is_abandoned_no_place_is_written():
    trainer = DeviceTrainer(0)
    copies, places = start(trainer, trainer.memory())
    copies.abandon()
    before = [place.clone() for place in places]
    trainer.device.do_some_work(1000)
    assert all(
        torch.equal(
            p,
            b,
        )
        or p.isnan().all()
        for p, b in zip(places, before, strict=True)
    )


def test_copies_of_a_host_without_devices_are_those_of_the_host():
    trainer = DeviceTrainer(0)
    copies = DeviceCopies(AtOnce(), StepMemory((), ()), SimulatedDevice(1))
    place = torch.full((1,), torch.nan)
    copies.copy(place.view(torch.uint8), trainer.count)
    copies.close()
    assert copies.are_done
    copies.finish()
    assert torch.equal(place, trainer.count)
