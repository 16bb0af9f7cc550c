"""``ResumableLoader``: a data loader whose place can be saved, and gone on from on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from dcp_resume.data.order import SampleKey
from dcp_resume.data.randomness import KeyedDataset, Randomness, already_collated
from dcp_resume.data.sampler import ResumableSampler
from dcp_resume.data.seeds import derived_seed
from dcp_resume.data.state import DataState, refuse
from dcp_resume.data.worker_signals import start_worker
from dcp_resume.errors import ConfigurationError, Problem, StateError
from dcp_resume.manifest.report import ReportItem, Severity

__all__ = ["ResumableLoader"]

_OWN_OPTIONS = frozenset(
    {"batch_size", "batch_sampler", "drop_last", "generator", "sampler", "shuffle"}
)


class ResumableLoader:
    """Yields this rank's micro batches, and counts what the trainer received.

        >>> sampler = ResumableSampler(6, global_batch=2, micro_batch=2)
        >>> loader = ResumableLoader(list(range(6)), sampler)
        >>> _ = next(iter(loader))
        >>> loader.consumed_samples
        2

    One iteration is the rest of the epoch, the next one the next epoch. It is a ``Stateful``: put
    it into the state that is saved. Batches that workers have fetched ahead do not count, and are
    fetched again. Iterating moves no random stream of the trainer.

    Args:
        dataset: Map-style: ``dataset[index]`` is a sample.
        sampler: Says which samples; its ``position`` is this loader's to move.
        loader_class: ``torch.utils.data.DataLoader``, or one with the same arguments.
        randomness: What random numbers drawn by the dataset and ``collate_fn`` depend on.
        options: Those of ``loader_class``: ``num_workers``, ``collate_fn``, ``pin_memory`` …

    Raises:
        ConfigurationError: An option that the sampler decides on, or a dataset that does not fit.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: ResumableSampler,
        *,
        loader_class: Callable[..., DataLoader[Any]] = DataLoader,
        randomness: Randomness = Randomness.PER_SAMPLE,
        **options: Any,
    ) -> None:
        _check_options(options)
        _check_dataset(dataset, sampler.setup.num_samples)
        self._sampler, self._position = sampler, sampler.position
        self._generator = torch.Generator(device="cpu")
        self._num_iterations = 0
        self._compared: Mapping[str, Any] = {}
        batches: Sampler[Any] = sampler
        if randomness is Randomness.PER_SAMPLE:
            collate = options.get("collate_fn") or default_collate
            dataset = KeyedDataset(dataset, collate, sampler.setup.seed)
            options["collate_fn"], batches = already_collated, _KeyedBatches(sampler)
        options["worker_init_fn"] = partial(start_worker, options.get("worker_init_fn"))
        self._loader = loader_class(
            dataset, batch_sampler=batches, generator=self._generator, **options
        )

    # Iterating.

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch; a loop that was left early is gone on with.

        Raises:
            ConfigurationError: A load or a newer iteration has moved the position since.
        """
        self._num_iterations += 1
        number = self._num_iterations
        self._sampler.position = self._position
        setup, epoch = self._sampler.setup, self._position.epoch
        self._generator.manual_seed(derived_seed("workers", setup.seed, epoch, self._sampler.rank))
        with _cpu_by_default():
            batches = iter(self._loader)
        for batch in batches:
            self._position = self._sampler.batching.after(self._position)
            yield batch
            if number != self._num_iterations:
                raise ConfigurationError(
                    "a load or a newer iteration has moved the position since this iteration "
                    "began; begin a new one",
                    option="data",
                )

    def __len__(self) -> int:
        """Micro batches that remain in the epoch."""
        return self._sampler.batching.remaining_micro_batches(self._position)

    @property
    def epoch(self) -> int:
        """Of the next sample, from 0."""
        return self._position.epoch

    @property
    def consumed_samples(self) -> int:
        """In completed steps since the beginning of the run, over all ranks."""
        return self._position.consumed_samples

    @property
    def is_step_complete(self) -> bool:
        """Whether all micro batches of an optimizer step were received: time to take it."""
        return self._position.received_micro_batches == 0

    # Saving and loading.

    def state_dict(self) -> dict[str, int | str]:
        """The position, equal on all ranks; plain values.

        Raises:
            StateError: In the middle of a step, whose gradients would be lost.
        """
        received, accumulation = self._position.received_micro_batches, self._sampler.accumulation
        if received:
            samples = received * self._sampler.setup.micro_batch
            reason = (
                f"micro batch {received} of {accumulation} of the step was received: gradients of "
                f"{samples} samples on each rank would be lost"
            )
            raise StateError(
                f"the data position cannot be taken in the middle of a step: {reason}; save and "
                f"load when is_step_complete",
                problems=(Problem("data", "position", reason),),
            )
        return self._sampler.state(self._position).to_dict()

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """Compare a saved state with this loader, before a load.

        Whoever loads the same state next has decided to, whatever was refused here: only what is
        impossible is refused again.
        """
        self._compared = dict(saved)
        try:
            items = list(self._sampler.compare(DataState.parse(saved)))
        except ConfigurationError as error:
            items = [ReportItem(Severity.REFUSE, "position", "version", str(error))]
        return iter(items)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved position; iterations under way end with an error.

        Raises:
            ConfigurationError: That is impossible, or would not be exact and ``differences`` was
                not asked before.
        """
        saved = DataState.parse(state_dict)
        is_decided = bool(self._compared) and all(
            state_dict.get(name) == value for name, value in self._compared.items()
        )
        refuse(
            item
            for item in self._sampler.compare(saved)
            if item.severity is Severity.REFUSE and (item.kind == "position" or not is_decided)
        )
        self._compared = {}
        self._position = self._sampler.batching.settled(saved.position)
        self._num_iterations += 1


def _cpu_by_default() -> AbstractContextManager[Any]:
    """Torch draws the workers' seed on the default device, where our generator may not be."""
    # Not entered in vain: forked workers inherit it, and it slows every call into torch.
    is_cpu = torch.get_default_device().type == "cpu"
    return nullcontext() if is_cpu else torch.device("cpu")


class _KeyedBatches(Sampler[list[SampleKey]]):
    """The micro batches of one iteration of a sampler, by key."""

    def __init__(self, sampler: ResumableSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[SampleKey]]:
        position = self._sampler.position
        epoch = position.epoch
        while position.epoch == epoch:
            yield self._sampler.keys(position)
            position = self._sampler.batching.after(position)

    def __len__(self) -> int:
        return len(self._sampler)


def _check_options(options: Mapping[str, Any]) -> None:
    for name in sorted(_OWN_OPTIONS & options.keys()):
        raise ConfigurationError(f"{name} is decided by the sampler; leave it out", option=name)
    if not options.get("in_order", True):
        raise ConfigurationError(
            "in_order=False: a position tells nothing of batches that come in any order; leave it "
            "out",
            option="in_order",
        )


def _check_dataset(dataset: Any, num_samples: int) -> None:
    if isinstance(dataset, IterableDataset):
        raise ConfigurationError(
            "an IterableDataset has no samples by index; give a map-style dataset",
            option="dataset",
        )
    if isinstance(dataset, Sized) and len(dataset) != num_samples:
        raise ConfigurationError(
            f"the sampler has num_samples={num_samples}, the dataset {len(dataset)}; make the "
            f"sampler with len(dataset)",
            option="dataset",
        )
