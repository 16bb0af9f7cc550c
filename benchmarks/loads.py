"""Loads: on the mesh that saved, and on others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch.distributed as dist

from benchmarks.libraries import CONTENDERS
from benchmarks.options import Options, Trials
from benchmarks.payload import SIZES, num_bytes
from benchmarks.race import Race
from benchmarks.samples import Findings, Sample

__all__ = ["measure_loads"]


def measure_loads(options: Options) -> Iterator[Findings]:
    """Every library's loads of what it saved, on each size's meshes."""
    for name in options.sizes:
        size = SIZES[name]
        samples: list[Sample] = []
        trials = Trials()
        for library in options.among(CONTENDERS):
            with options.scratch("loads") as directory:
                given = (library, name, options.repetitions, str(directory))
                samples += trials.on_ranks(_save_and_load, size.ranks, *given)
                for ranks in size.other_ranks if CONTENDERS[library].reshards else ():
                    operation = f"load {size.ranks} → {ranks}"
                    samples += trials.on_ranks(_load, ranks, *given, operation)
        payload = num_bytes(size)
        yield Findings("loads", name, size.ranks, payload, samples, failures=trials.failures)


def _save_and_load(library: str, size: str, repetitions: int, directory: str) -> list[Sample]:
    race = Race(SIZES[size], Path(directory))
    with closing(CONTENDERS[library]()) as contender:
        contender.save(contender.prepare(race.state), race.path)
    dist.barrier()
    return _loads(race, "load", library, repetitions)


def _load(
    library: str, size: str, repetitions: int, directory: str, operation: str
) -> list[Sample]:
    return _loads(Race(SIZES[size], Path(directory)), operation, library, repetitions)


def _loads(race: Race, operation: str, library: str, repetitions: int) -> list[Sample]:
    samples: list[Sample] = []
    with closing(CONTENDERS[library]()) as contender:
        target = contender.prepare(race.target)
        for repetition in range(repetitions + 1):
            limit = race.read_limit()
            cost = race.load(lambda: contender.load(target, race.path))
            samples.append(Sample(library, operation, repetition, cost, limit))
    race.close()
    return samples
