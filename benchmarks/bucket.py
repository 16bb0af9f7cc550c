"""S3: whole checkpoints, and one object by each client, beside the best raw parallel transfer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.bucket_contenders import BUCKET, BUCKET_CONTENDERS
from benchmarks.cost import Cost, measure, over_network
from benchmarks.names import BEST, CHECKPOINT, OBJECT
from benchmarks.options import Options, Trials
from benchmarks.payload import SIZES, num_bytes
from benchmarks.race import Race
from benchmarks.s3 import Boto3, Client, Obstore, Presigned, race
from benchmarks.samples import Figure, Findings, Sample
from tests.support.s3_server import S3Server

__all__ = ["measure_s3"]


def measure_s3(options: Options) -> Iterator[Findings]:
    """One object up and down, then a checkpoint; the server shares the cores."""
    size, trials = options.size("bucket"), Trials()
    payload = num_bytes(size)
    with S3Server() as server:
        server.make_bucket(BUCKET)
        samples = race(server, payload, options.repetitions)
        label = options.label(OBJECT)
        yield Findings("s3", label, 1, payload, samples, _beside_the_best(label, samples))
        samples = []
        for library in options.among(BUCKET_CONTENDERS):
            with options.scratch("s3") as directory:
                given = (library, size.name, options.repetitions, str(directory), server.endpoint)
                samples += trials.on_ranks(_save_and_load, 1, *given)
        label = options.label(CHECKPOINT)
        yield Findings("s3", label, 1, payload, samples, failures=trials.failures)


def _beside_the_best(label: str, samples: Sequence[Sample]) -> list[Figure]:
    """Our time over that of the fastest client, the presigned requests among them."""
    figures: list[Figure] = []
    for operation in ("up", "down"):
        warm = [s for s in samples if s.operation == operation and s.repetition]
        times = {"presigned": statistics.median(s.limit.seconds for s in warm)}
        for library in dict.fromkeys(s.library for s in warm):
            own = [s.cost.seconds for s in warm if s.library == library]
            times[library] = statistics.median(own)
        ours = times.pop("dcp_resume")
        figures.append(Figure(label, operation, "dcp_resume", BEST, ours / min(times.values())))
    return figures


def _save_and_load(
    library: str, size: str, repetitions: int, directory: str, endpoint: str
) -> list[Sample]:
    server = S3Server()
    server.endpoint = endpoint  # it runs in another process
    contender = BUCKET_CONTENDERS[library](server)
    race = Race(SIZES[size], Path(directory))
    raw = _Raw(server, num_bytes(SIZES[size]))
    samples: list[Sample] = []
    for repetition in range(repetitions + 1):
        limit = raw.up()
        cost = measure(lambda: contender.save(race.state), over_network)
        samples.append(Sample(library, "save", repetition, cost, limit))
        limit = raw.down()
        cost = race.load(lambda: contender.load(race.target), over_network)
        samples.append(Sample(library, "load", repetition, cost, limit))
    contender.close()
    race.close()
    return samples


class _Raw:
    """As many random bytes by each raw client; the fastest is the limit."""

    def __init__(self, server: S3Server, num_bytes: int) -> None:
        self._data = np.random.default_rng(1).integers(0, 256, num_bytes, np.uint8)
        self._into = np.zeros_like(self._data)
        self._clients: list[Client] = [Presigned(server), Boto3(server)]
        if find_spec("obstore"):
            self._clients.append(Obstore(server))

    def up(self) -> Cost:
        return self._fastest([partial(client.up, self._data.data) for client in self._clients])

    def down(self) -> Cost:
        return self._fastest([partial(client.down, self._into.data) for client in self._clients])

    def _fastest(self, calls: Sequence[Callable[[], None]]) -> Cost:
        costs = [measure(call, over_network) for call in calls]
        return min(costs, key=lambda cost: cost.seconds)
