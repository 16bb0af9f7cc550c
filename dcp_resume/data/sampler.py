"""``ResumableSampler``: the micro batches of one rank, from any position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch.utils.data import Sampler

from dcp_resume.data.order import EpochOrder, Order, SampleKey
from dcp_resume.data.position import Batching, BatchSplit, Position, Tail
from dcp_resume.data.state import DataSetup, DataState, compare, refuse
from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.report import ReportItem, Severity

__all__ = ["MicroBatches", "ResumableSampler"]


class ResumableSampler(Sampler[list[int]]):
    """A batch sampler: each item is one micro batch of this rank, as indices in the dataset.

        >>> sampler = ResumableSampler(10, global_batch=4, micro_batch=2, order=Order.SEQUENTIAL)
        >>> list(sampler)
        [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]

    An iteration begins at ``position`` and ends with the epoch; when it has ended, the next one
    begins with the next epoch. What is saved is a ``ResumableLoader``, as only a loader knows what
    the trainer received: workers run ahead.

    Ranks that compute one replica together (tensor, pipeline or context parallel) have the same
    ``rank``.

    Args:
        num_samples: Of an epoch: the length of the dataset.
        global_batch: Samples of one optimizer step over all ranks.
        micro_batch: Samples of one forward pass of one rank.
        rank: Number of this rank among the data-parallel ranks.
        num_ranks: Data-parallel ranks.
        seed: Of the order, and of randomness keyed by sample; equal on all ranks.
        order: Order of the samples in an epoch.
        tail: What becomes of samples that do not fill a global batch at an epoch's end.
        fingerprint: Identifies the dataset, such as its version; a resume with another is refused.

    Raises:
        ConfigurationError: A number cannot work, or global batch, micro batch and ranks do not fit.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        num_ranks: int = 1,
        seed: int = 0,
        order: Order = Order.SHUFFLED,
        tail: Tail = Tail.CARRY,
        fingerprint: str = "",
    ) -> None:
        self.batching = Batching(
            num_samples, BatchSplit(global_batch, micro_batch, num_ranks), tail
        )
        if type(rank) is not int or rank not in range(num_ranks):
            raise ConfigurationError(
                f"rank must be 0 to {num_ranks - 1}, with {num_ranks} ranks, got {rank!r}",
                option="rank",
            )
        for name, value, kind in (("seed", seed, int), ("fingerprint", fingerprint, str)):
            if type(value) is not kind:
                raise ConfigurationError(
                    f"{name} must be of type {kind.__name__}, got {value!r}", option=name
                )
        self.rank = rank
        self.setup = DataSetup(
            num_samples=num_samples,
            seed=seed,
            order=order.value,
            tail=tail.value,
            global_batch=global_batch,
            micro_batch=micro_batch,
            num_ranks=num_ranks,
            fingerprint=fingerprint,
        )
        self._order = EpochOrder(num_samples, seed, order)
        self.position = Position()
        """Where the next iteration begins."""

    @property
    def accumulation(self) -> int:
        """Micro batches of each rank in one optimizer step."""
        return self.batching.split.accumulation

    def keys(self, position: Position) -> list[SampleKey]:
        """Epoch and index of the samples that this rank receives next."""
        return self._order.keys(self.batching.spans(position, self.rank))

    def state(self, position: Position) -> DataState:
        """What is saved of a position."""
        next_sample = self._order.sample_at(position.epoch, position.epoch_samples)
        return DataState(position, next_sample, self.setup)

    def compare(self, saved: DataState) -> Iterator[ReportItem]:
        """What differs between a saved state and this sampler."""
        return compare(saved, self.setup, self._order.sample_at)

    def __iter__(self) -> MicroBatches:
        return MicroBatches(self)

    def __len__(self) -> int:
        """Micro batches of an iteration that begins at ``position``."""
        return self.batching.remaining_micro_batches(self.position)


class MicroBatches(Iterator[list[int]]):
    """One iteration of a sampler, to the end of the epoch.

    It has a state, which torchdata's ``StatefulDataLoader`` takes along with every batch. Without
    one it would skip as many micro batches as this rank had received, whatever their size is now.
    """

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler, self._position, self._is_over = sampler, sampler.position, False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[int]:
        if self._is_over:
            raise StopIteration
        samples = [key.sample for key in self._sampler.keys(self._position)]
        position = self._sampler.batching.after(self._position)
        self._is_over = position.epoch != self._position.epoch
        self._position = position
        if self._is_over:
            self._sampler.position = position
        return samples

    def state_dict(self) -> dict[str, int | str]:
        """For saving, also in the middle of a step."""
        return self._sampler.state(self._position).to_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved place.

        Raises:
            ConfigurationError: That is impossible, or would not be exact.
        """
        saved = DataState.parse(state_dict)
        refuse(item for item in self._sampler.compare(saved) if item.severity is Severity.REFUSE)
        self._position = self._sampler.batching.settled(saved.position)
        self._sampler.position, self._is_over = self._position, False
