"""What training a save in the background costs: its pace beside the save, and the seconds lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.cost import by_rank
from benchmarks.libraries import CONTENDERS
from benchmarks.names import CORES, LOST, SPEED, training_on
from benchmarks.options import Options, Trials
from benchmarks.payload import SIZES, num_bytes
from benchmarks.race import Race
from benchmarks.samples import Figure, Findings

__all__ = ["Pace", "Work", "measure_training"]

_QUIET_S, _TINY_QUIET_S = 2.0, 0.1
"""As long are steps counted without a save, before each save."""


class Work:
    """Forward and backward as far as the machine is concerned: matmuls in the calling thread."""

    def __init__(self) -> None:
        self._left, self._right = torch.randn(2, 256, 256)

    def step(self) -> None:
        """A few milliseconds of work."""
        for _ in range(8):
            torch.mm(self._left, self._right)

    def last(self, seconds: float) -> int:
        """Work as long as that; the number of steps."""
        end = time.monotonic() + seconds
        return self.steps_until(lambda: time.monotonic() >= end)

    def steps_until(self, is_over: Callable[[], bool]) -> int:
        """Work until then, but one step at least, which has a pace; the number of steps."""
        self.step()
        steps = 1
        while not is_over():
            self.step()
            steps += 1
        return steps


def measure_training(options: Options) -> Iterator[Findings]:
    """Each library that saves in the background, with a core to spare and without one."""
    size, trials = options.size("one-rank"), Trials()
    libraries = [name for name in options.among(CONTENDERS) if CONTENDERS[name].is_async]
    quiet_s = _TINY_QUIET_S if options.is_tiny else _QUIET_S
    label = options.label("training")
    for ranks in (1, CORES):
        figures: list[Figure] = []
        for library in libraries:
            with options.scratch("training") as directory:
                given = (library, size.name, options.repetitions, str(directory), quiet_s)
                found = trials.on_ranks(_train, ranks, *given)
            where = training_on(ranks)
            figures += (Figure(label, where, library, *measured) for measured in found)
        payload = num_bytes(size)
        yield Findings("training", label, ranks, payload, others=figures, failures=trials.failures)


def _train(
    library: str, size: str, repetitions: int, directory: str, quiet_s: float
) -> list[tuple[str, float]]:
    """Measures of the rank that loses most, and their values."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    race, contender, work = Race(SIZES[size], Path(directory)), CONTENDERS[library](), Work()
    quiet, busy, stalled_s = Pace(), Pace(), 0.0
    state = contender.prepare(race.state)
    with ThreadPoolExecutor(1) as waiter:
        for repetition in range(repetitions + 1):
            race.forget()
            if repetition == 1:  # the cold save is not counted
                quiet, busy, stalled_s = Pace(), Pace(), 0.0
            quiet.count(lambda: work.last(quiet_s))
            started = time.monotonic()
            wait = contender.save_async(state, race.path)
            stalled_s += time.monotonic() - started
            saved = waiter.submit(wait)
            busy.count(lambda: work.steps_until(saved.done))  # noqa: B023 - called at once
            saved.result()
    contender.close()
    race.close()
    speed = min(by_rank(busy.rate / quiet.rate))
    return [(SPEED, speed), (LOST, max(by_rank(stalled_s + busy.lost_s(quiet))) / repetitions)]


class Pace:
    """Steps and their time."""

    def __init__(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def count(self, work: Callable[[], int]) -> None:
        """Add the steps that some work says it made, and how long they took."""
        started = time.monotonic()
        self._steps += work()
        self._seconds += time.monotonic() - started

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self._steps / self._seconds

    def lost_s(self, quiet: Pace) -> float:
        """How much sooner a trainer at the quiet pace would have made these steps."""
        return (1 - self.rate / quiet.rate) * self._seconds
