"""Where a run is in its data, and who gets which samples next: integers only.

Samples have *places* in the order of their epoch, 0 … num_samples - 1. A step takes the next
``global_batch`` places, cut into micro batches of neighbouring places; micro batch ``m`` of rank
``r`` is number ``m × num_ranks + r`` of the step. So the micro batches of a step are the same
lists of samples for every number of ranks, and a position says nothing of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from math import isqrt
from typing import NamedTuple

from dcp_resume.errors import ConfigurationError

__all__ = ["BatchSplit", "Batching", "Position", "Span", "Tail", "check_count", "dividing_sizes"]


class Tail(Enum):
    """What becomes of the samples at an epoch's end that do not fill a global batch."""

    CARRY = "carry"
    """The batch is filled with the first samples of the next epoch: nothing is ever dropped."""
    DROP = "drop"
    """They are dropped, and the next epoch begins with a new batch."""


class Span(NamedTuple):
    """Neighbouring places in the order of one epoch."""

    epoch: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Position:
    """What the trainer has received."""

    epoch: int = 0
    """Of the next sample."""
    epoch_samples: int = 0
    """Places of that epoch that completed steps have used up, over all ranks."""
    consumed_samples: int = 0
    """In completed steps since the beginning of the run, over all ranks."""
    received_micro_batches: int = 0
    """Of the step under way, by each rank."""


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """How the global batch of one optimizer step is split.

        >>> print(BatchSplit(global_batch=64, micro_batch=4, num_ranks=8))
        global batch 64 = micro batch 4 * 8 ranks * accumulation 2

    Raises:
        ConfigurationError: A number is below 1, or the product is not the global batch.
    """

    global_batch: int
    """Samples of one optimizer step, over all ranks."""
    micro_batch: int
    """Samples of one forward pass of one rank."""
    num_ranks: int
    """Data-parallel ranks."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "num_ranks"):
            check_count(name, getattr(self, name))
        remainder = self.global_batch % self.unit
        if remainder:
            below = self.global_batch - remainder
            sizes = " or ".join(str(size) for size in (below, below + self.unit) if size)
            raise ConfigurationError(
                f"global_batch {self.global_batch} / (micro_batch {self.micro_batch} * "
                f"{self.num_ranks} ranks = {self.unit}) leaves a remainder of {remainder}: the "
                f"ranks cannot accumulate equally; use a global_batch of {sizes}, or another "
                f"micro_batch",
                option="global_batch",
            )

    @property
    def unit(self) -> int:
        """Samples that all ranks together take at once."""
        return self.micro_batch * self.num_ranks

    @property
    def accumulation(self) -> int:
        """Micro batches of each rank in one optimizer step."""
        return self.global_batch // self.unit

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch} = micro batch {self.micro_batch} * "
            f"{self.num_ranks} ranks * accumulation {self.accumulation}"
        )


@dataclass(frozen=True, slots=True)
class Batching:
    """How epochs are cut into steps.

    Raises:
        ConfigurationError: There is no sample, or too few for one batch and the tail is dropped.
    """

    num_samples: int
    split: BatchSplit
    tail: Tail = Tail.CARRY

    def __post_init__(self) -> None:
        check_count("num_samples", self.num_samples)
        if self.tail is Tail.DROP and self.split.global_batch > self.num_samples:
            raise ConfigurationError(
                f"an epoch of {self.num_samples} samples has no batch of "
                f"{self.split.global_batch}, and Tail.DROP drops what does not fill one; use a "
                f"smaller global_batch, or Tail.CARRY",
                option="global_batch",
            )

    def spans(self, position: Position, rank: int) -> list[Span]:
        """Places of the micro batch that ``rank`` receives next; several at an epoch's end."""
        number = position.received_micro_batches * self.split.num_ranks + rank
        start = position.epoch_samples + number * self.split.micro_batch
        stop = start + self.split.micro_batch
        spans = []
        while start < stop:
            later, place = divmod(start, self.num_samples)
            size = min(stop - start, self.num_samples - place)
            spans.append(Span(position.epoch + later, place, place + size))
            start += size
        return spans

    def after(self, position: Position) -> Position:
        """The position when each rank has received one more micro batch."""
        received = position.received_micro_batches + 1
        if received < self.split.accumulation:
            return replace(position, received_micro_batches=received)
        later, place = divmod(position.epoch_samples + self.split.global_batch, self.num_samples)
        consumed = position.consumed_samples + self.split.global_batch
        return self.settled(Position(position.epoch + later, place, consumed))

    def settled(self, position: Position) -> Position:
        """The position at the next epoch, if this one has no batch left."""
        is_full = position.epoch_samples + self.split.global_batch <= self.num_samples
        if self.tail is Tail.CARRY or is_full:
            return position
        return Position(position.epoch + 1, 0, position.consumed_samples)

    def remaining_micro_batches(self, position: Position) -> int:
        """Micro batches that each rank still receives in the epoch."""
        places = self.num_samples - position.epoch_samples
        if self.tail is Tail.CARRY:
            places += self.split.global_batch - 1
        steps = places // self.split.global_batch
        return steps * self.split.accumulation - position.received_micro_batches


def dividing_sizes(consumed: int, unit: int, near: int) -> list[int]:
    """The multiples of ``unit`` next to ``near`` that divide ``consumed``: one below, one above.

    >>> dividing_sizes(96, 8, 40)
    [32, 48]
    >>> dividing_sizes(100, 8, 40)
    []
    """
    if consumed % unit:
        return []
    count = consumed // unit
    small = [size for size in range(1, isqrt(count) + 1) if count % size == 0]
    sizes = [unit * size for size in (*small, *(count // size for size in small))]
    below = max((size for size in sizes if size < near), default=0)
    above = min((size for size in sizes if size > near), default=0)
    return [size for size in (below, above) if size]


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number from 1.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(f"{name} must be an int, 1 or more, got {value!r}", option=name)
