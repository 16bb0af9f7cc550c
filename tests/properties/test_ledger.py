"""Every sample once an epoch, whatever was stopped, lost and rebuilt in between: by a ledger.

The ledger holds the samples of every step whose state was saved, in the order of the steps, and of
micro batches and ranks within a step. It knows no position and no epoch: cut into pieces of the
dataset's length, each piece must be a permutation.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from dcp_resume.data import Order, Randomness, ResumableLoader, ResumableSampler, Tail
from dcp_resume.errors import ConfigurationError

SEEDED = settings(derandomize=True, deadline=None)


@dataclass(frozen=True)
class Life:
    """One start of the job, to its end."""

    num_ranks: int
    micro_batch: int
    accumulation: int
    saved_steps: int
    lost_micro_batches: int
    """Received after the last save, when the job was killed."""

    @property
    def global_batch(self):
        return self.num_ranks * self.micro_batch * self.accumulation


lives = st.builds(
    Life, *(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)), *(st.integers(0, 9),) * 2
)
histories = st.lists(lives, min_size=1, max_size=7)
datasets = st.integers(1, 60)


def samplers_of(life, num_samples, **options):
    return [
        ResumableSampler(
            num_samples,
            global_batch=life.global_batch,
            micro_batch=life.micro_batch,
            rank=rank,
            num_ranks=life.num_ranks,
            **options,
        )
        for rank in range(life.num_ranks)
    ]


def through_json(states):
    """One state, which all ranks agree on, as it comes back from storage."""
    assert all(state == states[0] for state in states)
    return json.loads(json.dumps(states[0]))


def endless(batches):
    """Epoch after epoch."""
    while True:
        yield from batches


class Sampling:
    """All ranks of one life, each a sampler alone."""

    def __init__(self, samplers, state):
        self.iterations = [iter(sampler) for sampler in samplers]
        self.samplers = samplers
        if state is not None:
            for iteration in self.iterations:
                iteration.load_state_dict(state)

    def micro_batches(self):
        found = []
        for rank, sampler in enumerate(self.samplers):
            try:
                found.append(next(self.iterations[rank]))
            except StopIteration:
                self.iterations[rank] = iter(sampler)
                found.append(next(self.iterations[rank]))
        return found

    def state(self):
        return through_json([iteration.state_dict() for iteration in self.iterations])


class Loading:
    """All ranks of one life, each a loader."""

    def __init__(self, samplers, state, num_samples, loader_class, randomness):
        self.loaders = [
            ResumableLoader(
                range(num_samples),
                sampler,
                collate_fn=list,
                loader_class=loader_class,
                randomness=randomness,
            )
            for sampler in samplers
        ]
        if state is not None:
            for loader in self.loaders:
                loader.load_state_dict(state)
        self.batches = [endless(loader) for loader in self.loaders]

    def micro_batches(self):
        return [next(batches) for batches in self.batches]

    def state(self):
        return through_json([loader.state_dict() for loader in self.loaders])


def live(life, ranks):
    """The samples of the steps that were saved, and the last state."""
    kept, state = [], ranks.state()
    for _ in range(life.saved_steps):
        for _ in range(life.accumulation):
            kept.extend(sample for batch in ranks.micro_batches() for sample in batch)
        state = ranks.state()
    for _ in range(life.lost_micro_batches):
        ranks.micro_batches()
    return kept, state


def check_carried(ledger, num_samples):
    """Each sample exactly once in each whole epoch, and at most once in the last."""
    for start in range(0, len(ledger), num_samples):
        piece = ledger[start : start + num_samples]
        if len(piece) == num_samples:
            assert sorted(piece) == list(range(num_samples))
        else:
            assert len(set(piece)) == len(piece)


@settings(SEEDED, max_examples=500)
@given(histories, datasets, st.sampled_from(Order), st.integers(0, 3))
def test_every_sample_comes_exactly_once_an_epoch(history, num_samples, order, seed):
    ledger, state = [], None
    for life in history:
        samplers = samplers_of(life, num_samples, order=order, seed=seed)
        kept, state = live(life, Sampling(samplers, state))
        ledger.extend(kept)
    assert state["consumed_samples"] == len(ledger)
    check_carried(ledger, num_samples)


@settings(SEEDED, max_examples=100)
@given(
    histories,
    datasets,
    st.sampled_from([DataLoader, StatefulDataLoader]),
    st.sampled_from(Randomness),
)
def test_loaders_hand_over_every_sample_exactly_once_an_epoch(
    history, num_samples, loader_class, randomness
):
    ledger, state = [], None
    for life in history:
        samplers = samplers_of(life, num_samples)
        kept, state = live(life, Loading(samplers, state, num_samples, loader_class, randomness))
        ledger.extend(kept)
    assert state["consumed_samples"] == len(ledger)
    check_carried(ledger, num_samples)


@settings(SEEDED, max_examples=500)
@given(histories, datasets)
def test_with_a_dropped_tail_a_change_is_exact_or_refused(history, num_samples):
    ledger, state, epoch_samples = Counter(), None, 0
    for life in history:
        if life.global_batch > num_samples:
            continue
        try:
            ranks = Sampling(samplers_of(life, num_samples, tail=Tail.DROP), state)
        except ConfigurationError as error:
            refusal = str(error)
        else:
            refusal = ""
        remainder = epoch_samples % life.global_batch
        assert (f"remainder of {remainder}," in refusal) == bool(refusal) == bool(remainder)
        if refusal:
            continue
        kept, state = live(life, ranks)
        for start in range(0, len(kept), life.global_batch):
            if epoch_samples + life.global_batch > num_samples:
                ledger, epoch_samples = Counter(), 0  # what fills no batch is dropped
            ledger.update(kept[start : start + life.global_batch])
            epoch_samples += life.global_batch
            assert set(ledger.values()) == {1}
            assert ledger.total() == epoch_samples
        if epoch_samples + life.global_batch > num_samples:
            ledger, epoch_samples = Counter(), 0
