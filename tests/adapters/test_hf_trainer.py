"""transformers' own Trainer, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import pytest
import torch

from tests.adapters.hf_job import Job


def assert_equal(resumed, straight):
    assert resumed.losses == straight.losses[len(straight.losses) - len(resumed.losses) :]
    assert resumed.logs[:-1] == straight.logs[:-1]  # the last is of the call, not of the run
    assert resumed.lr == straight.lr
    torch.testing.assert_close(resumed.weights, straight.weights, rtol=0, atol=0)
    torch.testing.assert_close(
        resumed.optimizer["state"], straight.optimizer["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("options", "stop_after", "resumed_step"),
    [
        ({}, 5, 3),  # between two logged losses
        ({}, 14, 12),
        ({"save_steps": 5, "eval_strategy": "epoch"}, 13, 10),  # between two epochs
        ({"eval_strategy": "steps", "eval_steps": 3}, 8, 6),
        ({"gradient_accumulation_steps": 2, "save_steps": 2}, 7, 6),
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, 13, 10),
        ({"dataloader_num_workers": 2}, 8, 6),
        ({"max_steps": 17, "train_sampling_strategy": "sequential"}, 8, 6),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    tmp_path, options, stop_after, resumed_step
):
    straight = Job(tmp_path / "straight", options).run()
    job = Job(tmp_path / "stopped", options)
    stopped = job.run(stop_after)
    assert stopped.losses == straight.losses[: len(stopped.losses)]
    resumed = job.run()
    assert resumed.resumed_step == resumed_step
    assert_equal(resumed, straight)
