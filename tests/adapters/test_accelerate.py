"""A loop on Accelerate's own Accelerator, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import pytest
import torch

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
