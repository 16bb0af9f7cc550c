"""The randomness of augmentation, keyed so that it is the same on any workers and ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch

from dcp_resume.data.order import SampleKey
from dcp_resume.data.seeds import derived_seed

__all__ = ["KeyedDataset", "Randomness", "already_collated", "keyed_randomness"]


class Randomness(Enum):
    """What random numbers drawn while samples are made depend on."""

    PER_SAMPLE = "per_sample"
    """Seed, epoch and sample; in ``collate_fn``, seed, epoch and first sample of the micro batch.
    So it is the same on any number of workers and ranks, and after a resume."""
    PER_WORKER = "per_worker"
    """What the worker drew before, as in torch; its first seed depends on seed, epoch and rank.
    After a resume in mid-epoch that is another stream, and without workers it is the trainer's own;
    but the dataset is handed over as it is, and may read a batch at once (``__getitems__``)."""


@contextmanager
def keyed_randomness(seed: int, epoch: int, sample: int) -> Iterator[None]:
    """Inside, ``random``, ``numpy.random`` and torch's CPU generator depend on the three only.

    Afterwards they go on from where they were.

        >>> with keyed_randomness(seed=0, epoch=3, sample=17):
        ...     first = random.random()
        >>> with keyed_randomness(seed=0, epoch=3, sample=17):
        ...     first == random.random()
        True
    """
    with _kept_generators():
        _seed_generators(derived_seed("sample", seed, epoch, sample))
        yield


@contextmanager
def _kept_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed((seed & 0xFFFF_FFFF, seed >> 32))
    # torch.manual_seed would seed the generators of all devices too, and with them the trainer's.
    torch.default_generator.manual_seed(seed)


class KeyedDataset(torch.utils.data.Dataset[Any]):
    """A dataset that is read by the keys of a micro batch, and gives the whole batch, collated.

    Args:
        dataset: Map-style.
        collate: List of samples → batch.
        seed: Of the run.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self._dataset, self._collate, self._seed = dataset, collate, seed

    def __getitems__(self, keys: Sequence[SampleKey]) -> Any:
        samples = []
        with _kept_generators():
            for key in keys:
                _seed_generators(derived_seed("sample", self._seed, *key))
                samples.append(self._dataset[key.sample])
            _seed_generators(derived_seed("collate", self._seed, *keys[0]))
            return self._collate(samples)


def already_collated(batch: Any) -> Any:
    """The ``collate_fn`` that goes with a ``KeyedDataset``."""
    return batch
