"""An order depends on seed and epoch only, and randomness on the sample as well."""

from __future__ import annotations

import random

import numpy as np
import torch

from dcp_resume.data import Order, keyed_randomness
from dcp_resume.data.order import EpochOrder, shuffled
from dcp_resume.data.position import Span
from dcp_resume.data.seeds import derived_seed


def drawn():
    return random.random(), np.random.rand(), torch.rand(()).item()


def generators():
    return (
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
    )


def test_a_permutation_depends_on_seed_and_epoch_only():
    permutations = {
        (seed, epoch): tuple(shuffled(50, seed, epoch).tolist())
        for seed in (0, 1, -1, 2**80)
        for epoch in (0, 1)
    }
    assert all(sorted(permutation) == list(range(50)) for permutation in permutations.values())
    assert len(set(permutations.values())) == 8
    torch.manual_seed(5)
    assert tuple(shuffled(50, 1, 0).tolist()) == permutations[1, 0]


def test_a_permutation_is_made_on_the_cpu_and_moves_no_random_stream():
    before = generators()
    with torch.device("meta"):
        assert shuffled(5, 0, 0).device.type == "cpu"
    assert generators() == before


def test_any_places_of_any_epochs_can_be_asked_for():
    order = EpochOrder(7, 3, Order.SHUFFLED)
    wanted = {epoch: shuffled(7, 3, epoch).tolist() for epoch in range(5)}
    for epochs in ((0, 1), (4, 0), (2, 3), (3, 2), (0, 4)):
        keys = order.keys([Span(epochs[0], 5, 7), Span(epochs[1], 0, 3)])
        assert [key.epoch for key in keys] == [epochs[0]] * 2 + [epochs[1]] * 3
        samples = wanted[epochs[0]][5:] + wanted[epochs[1]][:3]
        assert [key.sample for key in keys] == samples
        assert order.sample_at(epochs[0], 5) == samples[0]


def test_sequential_places_are_samples():
    keys = EpochOrder(10**12, 0, Order.SEQUENTIAL).keys([Span(3, 10**11, 10**11 + 2)])
    assert keys == [(3, 10**11), (3, 10**11 + 1)]


def test_seeds_fit_a_generator_and_differ():
    seeds = {derived_seed(word, a, b) for word in "ab" for a in range(20) for b in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_keyed_randomness_depends_on_its_key_only_and_leaves_no_trace():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before, found = generators(), {}
    for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        with keyed_randomness(*key):
            found[key] = drawn()
        assert generators() == before
    assert all(len(set(column)) == 4 for column in zip(*found.values(), strict=True))
    drawn()
    with keyed_randomness(0, 1, 0):
        assert drawn() == found[0, 1, 0]


def test_keyed_randomness_ends_with_an_error_too():
    before = generators()
    try:
        with keyed_randomness(0, 0, 0):
            drawn()
            raise LookupError
    except LookupError:
        assert generators() == before
