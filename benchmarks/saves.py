"""Saves: blocking, in the background, and lazily behind forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.contenders import Contender
from benchmarks.cost import Meter, by_rank, over_ranks
from benchmarks.libraries import CONTENDERS
from benchmarks.names import COPIES, LAZY_LOST
from benchmarks.options import Options, Trials
from benchmarks.payload import SIZES, num_bytes
from benchmarks.race import Race
from benchmarks.samples import Figure, Findings, Sample
from benchmarks.trainer import as_trainer
from benchmarks.training import Pace, Work
from dcp_resume import CheckpointManager, SaveMode, Settings

__all__ = ["measure_saves"]

_LAZY = "lazy: stall"
_COPIES_A_STEP = 2
"""How long forward and backward last, in raw copies of the state."""


def measure_saves(options: Options) -> Iterator[Findings]:
    """Every library's saves on each size's own mesh."""
    for name in options.sizes:
        size = SIZES[name]
        found: list[Sample | Figure] = []
        trials = Trials()
        for library in options.among(CONTENDERS):
            for save in (_save, _save_lazily) if library == "dcp_resume" else (_save,):
                with options.scratch("saves") as directory:
                    given = (library, name, options.repetitions, str(directory))
                    found += trials.on_ranks(save, size.ranks, *given)
        payload = num_bytes(size)
        samples = [one for one in found if isinstance(one, Sample)]
        figures = [one for one in found if isinstance(one, Figure)]
        yield Findings("saves", name, size.ranks, payload, samples, figures, trials.failures)


def _save(library: str, size: str, repetitions: int, directory: str) -> list[Sample]:
    race = Race(SIZES[size], Path(directory))
    samples: list[Sample] = []
    with closing(CONTENDERS[library]()) as contender:
        state = contender.prepare(race.state)
        for repetition in range(repetitions + 1):
            if contender.is_async:
                race.forget()
                samples += _save_async(race, library, contender, state, repetition)
            race.forget()
            limit = race.write_limit()
            meter = Meter()
            contender.save(state, race.path)
            cost = over_ranks(meter.read())
            samples.append(Sample(library, "save", repetition, cost, limit))
    race.close()
    return samples


def _save_async(
    race: Race, library: str, contender: Contender, state: Any, repetition: int
) -> Iterator[Sample]:
    copying, writing = race.copy_limit(), race.write_limit()
    meter = Meter()
    wait = contender.save_async(state, race.path)
    stall = meter.read()
    wait()
    durable = over_ranks(meter.read())
    yield Sample(library, "async: stall", repetition, over_ranks(stall), copying)
    yield Sample(library, "async: durable", repetition, durable, writing)
    if repetition == 0:
        target = contender.prepare(race.target)
        race.load(lambda: contender.load(target, race.path))


def _save_lazily(
    library: str, size: str, repetitions: int, directory: str
) -> list[Sample | Figure]:
    race, work = Race(SIZES[size], Path(directory)), Work()
    state, target = as_trainer(race.state), as_trainer(race.target)
    found: list[Sample | Figure] = []
    lost: list[float] = []
    with CheckpointManager(race.path / "lazy", Settings(mode=SaveMode.LAZY)) as checkpoints:
        for repetition in range(repetitions + 1):
            race.forget()
            limit = race.copy_limit()
            training_s = _COPIES_A_STEP * limit.seconds
            quiet, busy = Pace(), Pace()
            quiet.count(lambda: work.last(training_s))  # noqa: B023 - called at once
            meter = Meter()
            pending = checkpoints.save(repetition, state)
            returned = meter.read()
            busy.count(lambda: work.last(training_s))  # noqa: B023 - called at once
            resumed = meter.read()
            pending.wait_until_staged()  # as the optimizer's step would
            stall = meter.read().without(returned, resumed)
            pending.result()
            found.append(Sample(library, _LAZY, repetition, over_ranks(stall), limit))
            if repetition:
                lost.append(max(by_rank(busy.lost_s(quiet))) / limit.seconds)
        race.load(lambda: checkpoints.load(target))
    race.close()
    return [*found, Figure(size, LAZY_LOST, library, COPIES, statistics.median(lost))]
