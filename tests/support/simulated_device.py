"""A device that works off its queues in any order that a device may, chosen by a seed.

Its memory is host memory. Within a queue work is done in order; between queues only what was said
to follow something follows it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Work:
    run: Callable[[], object]
    after: list[SimulatedMark] = field(default_factory=list)


@dataclass
class SimulatedMark:
    queue: SimulatedQueue
    length: int

    @property
    def is_reached(self) -> bool:
        return self.queue.num_done >= self.length

    def hold_caller(self) -> None:
        self.queue.device.trainer.follow(self)

    def wait(self) -> None:
        while not self.is_reached:
            self.queue.device.do_some_work(1)


class SimulatedQueue:
    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.num_done = 0
        self._work: list[Work] = []

    def add(self, run: Callable[[], object]) -> None:
        self._work.append(Work(run))

    def follow(self, mark: SimulatedMark) -> None:
        self._work.append(Work(lambda: None, [mark]))

    def follow_caller(self) -> None:
        self.follow(self.device.trainer.mark())

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.add(lambda: target.numpy().__setitem__(..., source.numpy()))

    def mark(self) -> SimulatedMark:
        return SimulatedMark(self, len(self._work))

    @property
    def can_go_on(self) -> bool:
        if self.num_done == len(self._work):
            return False
        return all(mark.is_reached for mark in self._work[self.num_done].after)

    def go_on(self) -> None:
        self._work[self.num_done].run()
        self.num_done += 1


class SimulatedDevice:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._memory: set[int] = set()
        self.trainer = SimulatedQueue(self)
        self._queues = [self.trainer]

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Moves a tensor to the device."""
        self._memory.add(values.untyped_storage().data_ptr())
        return values

    def has(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._memory

    def open_queue(self, device: torch.device) -> SimulatedQueue:
        self._queues.append(SimulatedQueue(self))
        return self._queues[-1]

    def do_some_work(self, count: int) -> None:
        for _ in range(count):
            ready = [queue for queue in self._queues if queue.can_go_on]
            if not ready:
                return
            self._random.choice(ready).go_on()
