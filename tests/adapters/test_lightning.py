"""Lightning's own Trainer, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from tests.adapters.lightning_job import BATCH, Job, Noisy


def assert_equal(resumed, straight):
    assert resumed.losses == straight.losses[len(straight.losses) - len(resumed.losses) :]
    assert resumed.lr == straight.lr
    torch.testing.assert_close(resumed.weights, straight.weights, rtol=0, atol=0)
    torch.testing.assert_close(resumed.optimizer, straight.optimizer, rtol=0, atol=0)


def workers():
    return DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2)


@pytest.mark.parametrize(
    ("options", "stop_after", "resumed_step"),
    [
        ({}, 8, 6),  # in the first epoch
        ({}, 14, 12),  # in the second
        ({"options": {"accumulate_grad_batches": 3}}, 4, 3),
        ({"save_interval": 5}, 13, 10),  # between two epochs
        ({"save_interval": 5, "options": {"max_steps": 27}}, 13, 10),
        ({"options": {"val_check_interval": 3}}, 8, 6),  # after a validation
        ({"validates": False, "loader": workers}, 14, 12),
        ({"validates": False, "loader": workers, "save_interval": 5}, 13, 10),
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
