"""``ResumableLoader`` counts what the trainer received, whoever fetches ahead."""

from __future__ import annotations

import json
import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from dcp_resume import CheckpointManager, LoadOptions, Severity, TrainerState
from dcp_resume.data import Order, Randomness, ResumableLoader, ResumableSampler, Tail
from dcp_resume.errors import ConfigurationError, LoadRefused, StateError

ENGINES = [DataLoader, StatefulDataLoader]
WORKERS = {"num_workers": 2, "prefetch_factor": 3}


class Augmented:
    """Samples that each generator had a part in."""

    def __init__(self, num_samples=24):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def noisy(samples):
    """A ``collate_fn`` that draws, too."""
    return [*samples, random.random()]


def loader_of(dataset=range(24), options=(), **sampling):
    sampling = {"global_batch": 4, "micro_batch": 2, **sampling}
    sampler = ResumableSampler(len(dataset), **sampling)
    return ResumableLoader(dataset, sampler, **{"collate_fn": list, **dict(options)})


def stored(loader):
    return json.loads(json.dumps(loader.state_dict()))


def resumed(saved, *args, **sampling):
    loader = loader_of(*args, **sampling)
    loader.load_state_dict(saved)
    return loader


def generators():
    numpy_state = [part for part in np.random.get_state() if not isinstance(part, np.ndarray)]
    return (
        random.getstate(),
        numpy_state,
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )


def flat(batches):
    return [sample for batch in batches for sample in batch]


# Iterating.


def test_one_loop_is_the_rest_of_the_epoch_and_the_next_loop_the_next_epoch():
    loader = loader_of(range(22))
    assert (loader.epoch, len(loader), loader.is_step_complete) == (0, 12, True)
    first = list(loader)
    assert sorted(flat(first)[:22]) == list(range(22))
    assert (loader.epoch, loader.consumed_samples, len(loader)) == (1, 24, 10)
    second = list(loader)
    assert sorted(flat(first)[22:] + flat(second)) == list(range(22))
    assert (loader.epoch, loader.consumed_samples, len(loader)) == (2, 44, 12)


def test_a_dropped_tail_leaves_every_epoch_as_long():
    loader = loader_of(range(22), tail=Tail.DROP)
    for epoch in range(3):
        assert loader.epoch == epoch
        assert len(set(flat(loader))) == 20


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, WORKERS, {**WORKERS, "persistent_workers": True}])
def test_a_loop_left_early_is_gone_on_with(engine, options):
    whole = loader_of(order=Order.SEQUENTIAL)
    wanted = [list(whole), list(whole)]
    loader = loader_of(order=Order.SEQUENTIAL, options={"loader_class": engine, **options})
    found = list(islice(loader, 3))
    assert (loader.consumed_samples, loader.is_step_complete, len(loader)) == (4, False, 9)
    found += list(islice(loader, 2))
    assert (loader.consumed_samples, loader.is_step_complete) == (8, False)
    found += list(loader)
    assert [found, list(loader)] == wanted


def test_an_iteration_ends_with_an_error_when_the_position_was_moved():
    loader = loader_of()
    saved, batches = stored(loader), iter(loader)
    next(batches)
    loader.load_state_dict(saved)
    with pytest.raises(ConfigurationError, match="begin a new one"):
        next(batches)
    older, newer = iter(loader), iter(loader)
    found = [next(older), next(newer)]
    with pytest.raises(ConfigurationError, match="begin a new one"):
        next(older)
    found.extend(newer)
    assert found == list(loader_of())


def test_a_sample_that_cannot_be_read_is_not_counted():
    class Broken(Augmented):
        is_broken = True

        def __getitem__(self, index):
            if self.is_broken and index == 5:
                raise OSError("no such sample")
            return index

    dataset = Broken()
    loader = loader_of(dataset, order=Order.SEQUENTIAL)
    with pytest.raises(OSError, match="no such sample"):
        list(loader)
    assert loader.consumed_samples == 4
    dataset.is_broken = False
    assert flat(loader) == list(range(4, 24))


def test_the_sampler_is_a_batch_sampler_for_torch():
    sampler = ResumableSampler(10, global_batch=4, micro_batch=2, rank=1, num_ranks=2)
    loader = DataLoader(range(10), batch_sampler=sampler, collate_fn=list)
    lengths = [(len(loader), len(list(loader))) for _ in range(4)]
    assert lengths == [(3, 3), (2, 2), (3, 3), (2, 2)]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 4}, "batch_size"),
        ({"shuffle": True}, "shuffle"),
        ({"generator": torch.Generator()}, "generator"),
        ({"in_order": False}, "in_order"),
    ],
)
def test_what_the_sampler_decides_is_no_option(options, name):
    with pytest.raises(ConfigurationError, match=name) as caught:
        loader_of(options=options)
    assert caught.value.option == name


def test_a_dataset_must_have_the_length_that_the_sampler_counts_on():
    sampler = ResumableSampler(24, global_batch=4, micro_batch=4)
    with pytest.raises(ConfigurationError, match="num_samples=24, the dataset 23"):
        ResumableLoader(range(23), sampler)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ConfigurationError, match="map-style"):
        ResumableLoader(Stream(), sampler)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"rank": 2, "num_ranks": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"seed": 1.5}, "seed"),
        ({"fingerprint": 7}, "fingerprint"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused_by_name(options, name):
    with pytest.raises(ConfigurationError, match=name) as caught:
        ResumableSampler(24, **{"global_batch": 4, "micro_batch": 2, **options})
    assert caught.value.option == name


# Saving and resuming.


def test_a_save_in_the_middle_of_a_step_is_refused_with_the_arithmetic():
    loader = loader_of(global_batch=12)
    list(islice(loader, 2))
    with pytest.raises(StateError) as caught:
        loader.state_dict()
    assert "micro batch 2 of 6 of the step was received: gradients of 4 samples" in str(
        caught.value
    )
    assert caught.value.problems[0].kind == "position"
    list(islice(loader, 4))
    assert loader.state_dict()["consumed_samples"] == 12


@pytest.mark.parametrize("engine", ENGINES)
def test_prefetched_batches_do_not_count(engine):
    options = {"loader_class": engine, **WORKERS}
    wanted = list(loader_of(options=options))
    for num_steps in (0, 1, 5):
        loader = loader_of(options=options)
        batches = iter(loader)
        assert list(islice(batches, 2 * num_steps)) == wanted[: 2 * num_steps]
        assert loader.consumed_samples == 4 * num_steps
        assert list(resumed(stored(loader))) == wanted[2 * num_steps :]


@pytest.mark.parametrize("rank", range(3))
def test_every_rank_reads_the_batches_that_it_would_have_read(rank):
    options = {"rank": rank, "num_ranks": 3, "global_batch": 6, "micro_batch": 1}
    whole, loader = loader_of(**options), loader_of(**options)
    wanted = [*whole, *whole]
    found = [*loader, *islice(loader, 4)]
    assert [*found, *resumed(stored(loader), **options)] == wanted


@pytest.mark.parametrize("randomness", Randomness)
@pytest.mark.parametrize("options", [{}, WORKERS])
def test_loading_moves_no_random_stream_of_the_trainer(randomness, options):
    before = generators()
    loader = loader_of(options={"randomness": randomness, **options})
    list(islice(loader, 4)), list(loader)
    resumed(stored(loader), options=options)
    assert generators() == before


def test_augmentation_in_this_process_moves_no_random_stream_either():
    before = generators()
    list(loader_of(Augmented(), options={"collate_fn": noisy}))
    assert generators() == before


def test_a_default_device_does_not_matter():
    with torch.device("meta"):
        assert sorted(flat(loader_of())) == list(range(24))


@pytest.mark.parametrize("engine", ENGINES)
def test_augmented_samples_are_the_same_on_other_workers_and_ranks(engine):
    wanted = list(loader_of(Augmented(), options={"collate_fn": noisy}, seed=3))
    first = loader_of(Augmented(), options={"collate_fn": noisy, **WORKERS}, seed=3)
    found = list(islice(first, 4))
    ranks = [
        resumed(
            stored(first),
            Augmented(),
            {"collate_fn": noisy, "num_workers": rank, "loader_class": engine},
            seed=3,
            rank=rank,
            num_ranks=2,
        )
        for rank in range(2)
    ]
    for pair in zip(*ranks, strict=True):
        found.extend(pair)
    assert found == wanted
    draws = [sample[1:] for batch in wanted for sample in batch[:2]]
    assert len(set(draws)) == 24


def test_augmentation_differs_between_epochs_and_seeds():
    loader, other = loader_of(Augmented()), loader_of(Augmented(), seed=1)
    draws = [set(flat(batches)) for batches in (loader, loader, other)]
    assert not draws[0] & (draws[1] | draws[2])


def test_workers_draw_from_seed_epoch_and_rank_if_they_are_to():
    options = {"randomness": Randomness.PER_WORKER, **WORKERS}

    def draws(**sampling):
        return list(loader_of(Augmented(), options, **sampling))

    found = draws()
    torch.manual_seed(1234)
    assert draws() == found
    ranks = [draws(rank=rank, num_ranks=2) for rank in range(2)]
    assert not {draw[1] for draw in flat(ranks[0])} & {draw[1] for draw in flat(ranks[1])}


# With torchdata's own state.


def torchdata_loader(num_workers, **sampling):
    sampler = ResumableSampler(22, **{"global_batch": 4, "micro_batch": 2, **sampling})
    return StatefulDataLoader(
        range(22), batch_sampler=sampler, num_workers=num_workers, collate_fn=list
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchdatas_own_state_goes_on_exactly_on_another_number_of_ranks(num_workers):
    loader = torchdata_loader(num_workers)
    batches = iter(loader)
    taken = list(islice(batches, 6))
    saved = stored(loader)
    wanted = list(batches)
    assert sorted(flat(taken + wanted)[:22]) == list(range(22))
    ranks = [torchdata_loader(num_workers, rank=rank, num_ranks=2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(saved)
    assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == wanted
    ended, following = stored(loader), list(loader)
    again = torchdata_loader(num_workers)
    again.load_state_dict(ended)
    assert list(again) == following


def test_torchdatas_own_state_in_the_middle_of_a_step_needs_the_same_split():
    loader = torchdata_loader(0)
    batches = iter(loader)
    next(batches)
    saved = stored(loader)
    same, other = torchdata_loader(0), torchdata_loader(0, rank=0, num_ranks=2)
    same.load_state_dict(saved)
    assert list(same) == list(batches)
    other.load_state_dict(saved)
    with pytest.raises(ConfigurationError, match="after micro batch 1 of 2 of a step"):
        iter(other)


# With a manager.


def job_of(**sampling):
    return {"data": loader_of(**sampling), "trainer": TrainerState(), "w": torch.zeros(2)}


def train(job, checkpoints, num_steps):
    """Consume whole steps; save after each."""
    seen, data, trainer = [], job["data"], job["trainer"]
    while trainer.step < num_steps:
        for batch in data:
            seen.extend(batch)
            if not data.is_step_complete:
                continue
            samples = data.consumed_samples - trainer.consumed_samples
            trainer.advance(step=trainer.step + 1, samples=samples)
            trainer.epoch = data.epoch
            checkpoints.save(trainer.step, job).result()
            if trainer.step == num_steps:
                break
    return seen


def test_a_manager_brings_the_position_back_for_another_batch(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        seen = train(job_of(), checkpoints, 4)
    job = job_of(global_batch=8, micro_batch=1)
    with CheckpointManager(tmp_path) as checkpoints:
        result = checkpoints.resume(job)
        assert result.step == 4
        assert [item.where for item in result.report.of(Severity.WARN)] == ["data.global_batch"]
        assert job["data"].consumed_samples == job["trainer"].consumed_samples == 16
        seen += train(job, checkpoints, 7)
    assert sorted(seen[:24]) == list(range(24))
    assert len(set(seen[24:])) == len(seen[24:]) == 16
    assert job["data"].epoch == job["trainer"].epoch == 1


def test_a_manager_does_not_save_in_the_middle_of_a_step(tmp_path):
    job = job_of()
    next(iter(job["data"]))
    with (
        CheckpointManager(tmp_path) as checkpoints,
        pytest.raises(StateError, match="is_step_complete"),
    ):
        checkpoints.save(0, job)


def test_a_manager_refuses_another_order_before_anything_changes_unless_it_is_overridden(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        train(job_of(), checkpoints, 2)
    job = job_of(seed=1)
    job["w"] += 1
    with CheckpointManager(tmp_path) as checkpoints:
        with pytest.raises(LoadRefused, match=r"data\.seed: saved 0, now 1"):
            checkpoints.load(job)
        assert job["data"].consumed_samples == 0
        assert job["w"].tolist() == [1, 1]
        options = LoadOptions(overrides={"data:data.seed": Severity.WARN})
        report = checkpoints.load(job, options=options).report
        assert [(item.severity, item.where) for item in report.of(Severity.WARN)] == [
            (Severity.WARN, "data.seed")
        ]
        assert job["data"].consumed_samples == 8
