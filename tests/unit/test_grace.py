"""What is saved before the process is killed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dcp_resume import WhenShort
from dcp_resume.manager.grace import Budget, ExitAction, RunningSave, SaveTimes, optimizer_share

SAVE, LIGHT = ExitAction.SAVE, ExitAction.SAVE_WITHOUT_OPTIMIZER
WAIT, LEAVE = ExitAction.WAIT, ExitAction.LEAVE
STEP = 100
RUNNING = RunningSave(step=90, elapsed_s=4.0)
"""Of 10 s: 6 more to go."""

# A save takes 10 s, and is given 15; without the optimizer 4 s, and is given 6.
CASES = [
    # left, running, saved, may leave the optimizer out → what is done
    (math.inf, None, None, False, SAVE),
    (15.0, None, None, False, SAVE),
    (14.9, None, None, False, LEAVE),
    (14.9, None, None, True, LIGHT),
    (6.0, None, None, True, LIGHT),
    (5.9, None, None, True, LEAVE),
    (0.0, None, None, True, LEAVE),
    (21.0, RUNNING, 80, False, SAVE),
    (20.9, RUNNING, 80, False, WAIT),
    (20.9, RUNNING, 80, True, LIGHT),
    (11.9, RUNNING, 80, True, WAIT),
    (0.0, RUNNING, 80, False, WAIT),
    (30.0, RunningSave(90, elapsed_s=25.0), 80, False, SAVE),  # late, but not negative
    (14.9, RunningSave(90, elapsed_s=25.0), 80, False, WAIT),
    (30.0, RunningSave(STEP, 0.0), 90, True, WAIT),  # this step is being saved already
    (30.0, None, STEP, True, LEAVE),  # or was
]


@pytest.mark.parametrize(("left_s", "running", "saved", "may_be_light", "action"), CASES)
def test_choice(left_s, running, saved, may_be_light, action):
    budget = Budget(left_s, save_s=10.0, optimizer_share=0.6, margin=1.5)
    when_short = WhenShort.LEAVE_OUT_OPTIMIZER if may_be_light else WhenShort.LEAVE

    assert budget.choose(STEP, running, saved, when_short) is action


@pytest.mark.parametrize(("left_s", "action"), [(0.1, SAVE), (0.0, LEAVE)])
def test_a_save_that_was_never_measured_is_tried(left_s, action):
    assert Budget(left_s).choose(1, None, None, WhenShort.LEAVE) is action


def test_a_state_without_an_optimizer_is_not_saved_without_it():
    budget = Budget(1.0, save_s=10.0, optimizer_share=0.0)

    assert budget.choose(1, None, None, WhenShort.LEAVE_OUT_OPTIMIZER) is LEAVE


def test_the_slowest_of_the_last_five_saves_counts():
    times = SaveTimes()
    assert times.save_s == 0.0
    for duration_s in (9.0, 1.0, 2.0, 8.0, 3.0):
        times.note(duration_s)
    assert times.save_s == 9.0
    times.note(4.0)
    assert times.save_s == 8.0


def test_the_optimizers_share_is_counted_in_bytes():
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": [model], "optim": optimizer, "step": 1}
    assert optimizer_share(state) == 0.0
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()

    moments, weights, count = 2 * 64 * 4, 64 * 4, 4
    assert optimizer_share(state) == (moments + count) / (moments + count + weights)
    assert optimizer_share({"anything": 3}) == 0.0
