"""What is measured: calls beside their limit, and figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.cost import Cost

__all__ = ["Figure", "Findings", "Sample"]

_MIB = 1 << 20
IO_WINDOW_BYTES = 64 * _MIB
"""What a background save may hold beside its copy of a rank's bytes."""


@dataclass(frozen=True)
class Sample:
    """One measured call, and the limit probed in the same processes just before."""

    library: str
    operation: str
    repetition: int
    """0 is the cold one, the first of its kind."""
    cost: Cost
    limit: Cost

    @property
    def ratio(self) -> float:
        """Of wall times; 1 is the machine."""
        return self.cost.seconds / self.limit.seconds

    @property
    def cpu_ratio(self) -> float:
        """Of CPU times."""
        return self.cost.cpu_seconds / max(self.limit.cpu_seconds, 1e-9)


@dataclass(frozen=True)
class Figure:
    """One number that a run found."""

    size: str
    operation: str
    library: str
    measure: str
    """What the value counts, such as ``time``: the ratio to the limit's."""
    value: float


@dataclass(frozen=True)
class Findings:
    """What one subject found with one payload."""

    subject: str
    size: str
    ranks: int
    payload_bytes: int
    samples: Sequence[Sample] = ()
    others: Sequence[Figure] = ()
    """Figures that are not drawn from samples."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Library → why it was given up."""

    def figures(self) -> list[Figure]:
        """Medians of the warm samples, and the others."""
        return [*self._of_samples(), *self.others]

    def by_call(self) -> Iterator[tuple[str, str, list[Sample]]]:
        """Operation, library, and its samples."""
        for operation in dict.fromkeys(sample.operation for sample in self.samples):
            same = [sample for sample in self.samples if sample.operation == operation]
            for library in dict.fromkeys(sample.library for sample in same):
                yield operation, library, [s for s in same if s.library == library]

    def _of_samples(self) -> Iterator[Figure]:
        for operation, library, samples in self.by_call():
            for measure, value in _measures(samples, self.payload_bytes, self.ranks):
                yield Figure(self.size, operation, library, measure, value)


def _measures(
    samples: Sequence[Sample], payload_bytes: int, ranks: int
) -> Iterator[tuple[str, float]]:
    warm = [sample for sample in samples if sample.repetition]

    def median(value: Callable[[Sample], float]) -> float:
        return statistics.median(map(value, warm))

    yield "time", median(lambda s: s.ratio)
    yield "CPU", median(lambda s: s.cpu_ratio)
    yield "cold", _cold(samples).ratio
    yield "seconds", median(lambda s: s.cost.seconds)
    yield "limit seconds", median(lambda s: s.limit.seconds)
    yield "CPU seconds", median(lambda s: s.cost.cpu_seconds)
    yield "read", median(lambda s: s.cost.read_bytes) / payload_bytes
    yield "written", median(lambda s: s.cost.written_bytes) / payload_bytes
    peak = max(sample.cost.rank_peak_bytes for sample in samples)
    yield "peak MiB", peak / _MIB
    yield "peak", max(0, peak - IO_WINDOW_BYTES) / (payload_bytes / ranks)


def _cold(samples: Iterable[Sample]) -> Sample:
    return next(sample for sample in samples if not sample.repetition)
