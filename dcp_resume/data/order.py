"""Which sample comes at which place of an epoch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

import torch

from dcp_resume.data.position import Span
from dcp_resume.data.seeds import derived_seed

__all__ = ["EpochOrder", "Order", "SampleKey", "shuffled"]


class Order(Enum):
    """The order of the samples in an epoch."""

    SHUFFLED = "shuffled"
    """A permutation that depends on the seed and the epoch only."""
    SEQUENTIAL = "sequential"
    """As in the dataset."""


class SampleKey(NamedTuple):
    """One sample in one epoch: all that its randomness may depend on, besides the seed."""

    epoch: int
    sample: int
    """Index in the dataset."""


def shuffled(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    """The permutation of an epoch; int64, shape ``[num_samples]``, on the CPU.

    It comes from a generator of its own, so that no random stream of the trainer moves.
    """
    generator = torch.Generator(device="cpu")
    generator.manual_seed(derived_seed("order", seed, epoch))
    return torch.randperm(num_samples, generator=generator, device="cpu")


class EpochOrder:
    """The orders of all epochs; holds two permutations, for batches across an epoch's end.

    Args:
        num_samples: Of an epoch.
        seed: Of the run, equal on all ranks.
        order: How an epoch is ordered.
    """

    def __init__(self, num_samples: int, seed: int, order: Order) -> None:
        self.num_samples, self.seed, self.order = num_samples, seed, order
        self._permutations: dict[int, torch.Tensor] = {}

    def keys(self, spans: Iterable[Span]) -> list[SampleKey]:
        """The samples at the places of the spans, in their order."""
        return [
            SampleKey(span.epoch, sample) for span in spans for sample in self._samples_of(span)
        ]

    def sample_at(self, epoch: int, place: int) -> int:
        """The sample at one place of an epoch."""
        return self.keys([Span(epoch, place, place + 1)])[0].sample

    def _samples_of(self, span: Span) -> Iterable[int]:
        if self.order is Order.SEQUENTIAL:
            return range(span.start, span.stop)
        samples: list[int] = self._permutation(span.epoch)[span.start : span.stop].tolist()
        return samples

    def _permutation(self, epoch: int) -> torch.Tensor:
        found = self._permutations.pop(epoch, None)
        if found is None:
            if len(self._permutations) == 2:
                del self._permutations[next(iter(self._permutations))]
            found = shuffled(self.num_samples, self.seed, epoch)
        self._permutations[epoch] = found  # the last one used is the last one to go
        return found
