"""A loop on Accelerate's own Accelerator, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import itertools

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from dcp_resume import CheckpointManager, SaveMode, Settings, errors
from dcp_resume.adapters.accelerate import AcceleratedRun
from tests.adapters.accelerate_job import Job

pytestmark = pytest.mark.adapters


def assert_equal(resumed, straight):
    assert resumed.losses == straight.losses[len(straight.losses) - len(resumed.losses) :]
    assert resumed.lr == straight.lr
    torch.testing.assert_close(resumed.weights, straight.weights, rtol=0, atol=0)
    assert torch.equal(resumed.average, straight.average)


@pytest.mark.parametrize(
    ("options", "stop_after", "resumed_step"),
    [
        ({}, 8, 6),
        ({}, 14, 12),
        ({"save_interval": 5}, 13, 10),  # between two epochs
        ({"data": {"use_seedable_sampler": True}}, 14, 12),
        ({"accumulation": 2, "save_interval": 2}, 7, 6),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tmp_path, options, stop_after, resumed_step
):
    straight = Job(tmp_path / "straight", **options).run()
    job = Job(tmp_path / "stopped", **options)
    stopped = job.run(stop_after)
    assert stopped.losses == straight.losses[: len(stopped.losses)]
    resumed = job.run()
    assert resumed.resumed_step == resumed_step
    assert_equal(resumed, straight)


def prepared(seed):
    """A run on an accelerator, and its loader of ten shuffled batches."""
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    loader = DataLoader(TensorDataset(torch.arange(20.0)), 2, shuffle=True)
    *_, loader = accelerator.prepare(model, optimizer, loader)
    return AcceleratedRun(accelerator), loader


def taken(batches, limit=10):
    return [batch.tolist() for (batch,) in itertools.islice(batches, limit)]


def test_parts_that_are_kept_say_at_each_save_where_the_run_is():
    run, loader = prepared(1)
    place = run.parts()["place"]
    assert not place.state_dict()["is_bound"]
    batches = run.batches(loader)
    taken(batches, 4)
    assert place.state_dict()["is_bound"]
    taken(batches)
    assert not place.state_dict()["is_bound"]


def test_a_loop_that_is_left_early_ends_the_epoch_at_the_next_one():
    run, loader = prepared(1)
    first = taken(run.batches(loader), 4)
    assert run.epoch == 0
    second = taken(run.batches(loader))
    assert (run.epoch, len(second)) == (1, 10)
    assert second[:4] != first


def test_a_save_before_the_first_batch_after_a_resume_keeps_the_place(tmp_path):
    run, loader = prepared(1)
    settings = Settings(mode=SaveMode.BLOCKING)
    batches = run.batches(loader)
    with CheckpointManager(tmp_path, settings) as checkpoints:
        checkpoints.resume(run.parts())
        taken(batches, 4)
        run.trainer.advance(step=4)
        checkpoints.save(4, run.parts())
    rest = taken(batches)
    for step in (5, 6):
        run, loader = prepared(step)
        with CheckpointManager(tmp_path, settings) as checkpoints:
            assert checkpoints.resume(run.parts()).step == step - 1
            run.trainer.advance(step=step)
            checkpoints.save(step, run.parts())
    assert taken(run.batches(loader)) == rest


def adversaries(seed):
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1) for name in "ab"})
    optimizers = [torch.optim.AdamW(layer.parameters()) for layer in layers.values()]
    layers, *optimizers = accelerator.prepare(layers, *optimizers)
    return accelerator, layers, optimizers


def test_several_optimizers_are_parts_and_several_models_are_refused(tmp_path):
    _, trained, optimizers = made = adversaries(1)
    run = AcceleratedRun(made[0])
    sum(layer(torch.ones(1, 1)).sum() for layer in trained.values()).backward()
    for optimizer in optimizers:
        optimizer.step()
    run.trainer.advance(step=1)
    with CheckpointManager(tmp_path, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.resume(run.parts())
        checkpoints.save(1, run.parts())

    accelerator, layers, others = adversaries(2)
    run = AcceleratedRun(accelerator)
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.resume(run.parts())
    torch.testing.assert_close(layers.state_dict(), trained.state_dict(), rtol=0, atol=0)
    for other, optimizer in zip(others, optimizers, strict=True):
        saved, loaded = (part.optimizer.state_dict()["state"] for part in (optimizer, other))
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)

    accelerator.prepare(torch.nn.Linear(1, 1))
    with pytest.raises(errors.ConfigurationError, match="2 models were prepared"):
        run.parts()
