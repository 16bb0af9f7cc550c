"""The schedule that every rank follows: limit, contender, limit, next contender, and again.

Interleaved, so that a machine that becomes slower becomes so for all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.contenders import CONTENDERS, Contender
from benchmarks.cost import Cost, Meter, measure, over_ranks
from benchmarks.limits import RawLimits
from benchmarks.payload import SIZES, make_state, memory_of

__all__ = ["Sample", "race_here", "race_there"]


@dataclass(frozen=True)
class Sample:
    """One measured call, and the limit probed in the same processes just before."""

    library: str
    operation: str
    repetition: int
    cost: Cost
    limit: Cost


class _Race:
    def __init__(self, size: str, directory: str) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        self.state = make_state(SIZES[size], mesh, seed=1)
        self.other = make_state(SIZES[size], mesh, seed=2)
        self.directory = Path(directory)
        self.raw = RawLimits(list(memory_of(self.state)), self.directory / f"raw-{dist.get_rank()}")

    def path(self, library: str) -> Path:
        return self.directory / library.replace(" ", "-")

    def save(self, library: str, contender: Contender, repetition: int) -> Sample:
        limit = measure(self.raw.write)
        cost = measure(lambda: contender.save(self.state, self.path(library)))
        return Sample(library, "save", repetition, cost, limit)

    def save_async(self, library: str, contender: Contender, repetition: int) -> Iterator[Sample]:
        copying, writing = measure(self.raw.copy), measure(self.raw.write)
        meter = Meter()
        wait = contender.save_async(self.state, self.path(library))
        stall = meter.read()
        wait()
        durable = meter.read()
        yield Sample(library, "async: stall", repetition, over_ranks(stall), copying)
        yield Sample(library, "async: durable", repetition, over_ranks(durable), writing)

    def load(self, library: str, contender: Contender, repetition: int, operation: str) -> Sample:
        self._overwrite()
        limit = measure(self.raw.read)
        cost = measure(lambda: contender.load(self.other, self.path(library)))
        self._compare(library)
        return Sample(library, operation, repetition, cost, limit)

    def forget(self, library: str) -> None:
        """Give the space of its data back; what a library remembers of it in memory stays."""
        dist.barrier()
        if dist.get_rank() == 0:
            path = self.path(library)
            for old in list(path.glob("*/step-*")) or [path]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def _overwrite(self) -> None:
        for tensor in memory_of(self.other):
            tensor.fill_(0)

    def _compare(self, library: str) -> None:
        """A library that loads wrong numbers fast does not win."""
        pairs = zip(memory_of(self.other), memory_of(self.state), strict=True)
        if not all(torch.equal(found, expected) for found, expected in pairs):
            raise SystemExit(f"{library} loaded other values than it saved")

    def close(self) -> None:
        self.raw.close()


def race_here(
    size: str, libraries: Sequence[str], repetitions: int, directory: str
) -> list[Sample]:
    """Save, save in the background and load on the mesh that saves. Every rank alike.

    Repetition 0 is the cold one. What was saved last stays for ``race_there``.
    """
    race = _Race(size, directory)
    contenders = {name: CONTENDERS[name]() for name in libraries}
    samples: list[Sample] = []
    for repetition in range(repetitions + 1):
        for name, contender in _rotated(contenders, repetition):
            if contender.is_async:
                race.forget(name)
                samples += race.save_async(name, contender, repetition)
            race.forget(name)
            samples.append(race.save(name, contender, repetition))
            samples.append(race.load(name, contender, repetition, "load"))
    for contender in contenders.values():
        contender.close()
    race.close()
    return samples


def race_there(
    size: str, libraries: Sequence[str], repetitions: int, directory: str
) -> list[Sample]:
    """Load what ``race_here`` left on the mesh of these ranks."""
    race = _Race(size, directory)
    contenders = {name: CONTENDERS[name]() for name in libraries}
    contenders = {name: one for name, one in contenders.items() if one.reshards}
    operation = f"load {SIZES[size].ranks} → {dist.get_world_size()}"
    samples = [
        race.load(name, contender, repetition, operation)
        for repetition in range(repetitions + 1)
        for name, contender in _rotated(contenders, repetition)
    ]
    for contender in contenders.values():
        contender.close()
    race.close()
    return samples


def _rotated(contenders: dict[str, Contender], by: int) -> list[tuple[str, Contender]]:
    items = list(contenders.items())
    by %= len(items)
    return items[by:] + items[:by]
