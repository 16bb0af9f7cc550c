"""A small trainer that resumes, and may forget one thing when it does.

    python forgetful_trainer.py RUN STOP LAST rng|data|schedule|steps|everything|nothing

It drops units at random, walks through its data, and warms its learning rate down to the last step.
``everything`` begins anew though there is a checkpoint.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
from torch.nn.functional import dropout
from torch.optim.lr_scheduler import LambdaLR

from dcp_resume import CheckpointManager, RngState, SaveMode, Settings, TrainerState

EVERY = 2


class Place:
    """Where in the data it is."""

    def __init__(self) -> None:
        self.next_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next_row": self.next_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.next_row = state_dict["next_row"]


def train(run: str, stop: int, last: int, forgotten: str, start: int = 7) -> None:
    seed(start)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = LambdaLR(optimizer, lambda step: 1 - step / last)
    rows = torch.rand(32, 4, generator=torch.Generator().manual_seed(1))
    place, trainer = Place(), TrainerState()
    state = {"model": model, "optim": optimizer, "schedule": schedule, "data": place}
    state |= {"rng": RngState(), "trainer": trainer}
    with CheckpointManager(run, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        if forgotten != "everything" and checkpoints.resume(state):
            if forgotten == "rng":
                seed(start)
            elif forgotten == "data":
                place.next_row = 0
            elif forgotten == "steps":
                trainer.step = 0
            elif forgotten == "schedule":
                schedule = LambdaLR(optimizer, lambda step: 1 - step / last)
                state["schedule"] = schedule
        while trainer.step < stop:
            row = rows[place.next_row]
            place.next_row += 1
            optimizer.zero_grad()
            loss = dropout(model(row), 0.5).square().sum()
            loss.backward()
            optimizer.step()
            schedule.step()
            trainer.advance(step=trainer.step + 1, loss=loss.item())
            if trainer.step == stop or trainer.step % EVERY == 0:
                checkpoints.save(trainer.step, state)
    print(f"ended at step {trainer.step}")


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


if __name__ == "__main__":
    run, stop, last, forgotten = sys.argv[1:]
    train(run, int(stop), int(last), forgotten)
