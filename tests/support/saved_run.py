"""A small run on disk, its newest files, and a bit to flip in one."""

from __future__ import annotations

import torch

from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.settings import SaveMode, Settings
from dcp_resume.manager.trainer_state import TrainerState

__all__ = ["flip", "newest_file", "save_steps"]


def save_steps(root, steps, *, resume=False):
    """A run of a small model; going on from step ``resume``, if given."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    trainer = TrainerState()
    state = {"model": model, "optim": optimizer, "trainer": trainer}
    with CheckpointManager(root, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        if resume:
            checkpoints.resume(state, resume)
        for step in steps:
            trainer.advance(step=step, samples=32, loss=100.0 / step, last_lr=[0.001])
            checkpoints.save(step, state)


def newest_file(run, pattern):
    """The first file of step 30 that fits the pattern."""
    return sorted(run.glob(f"step-00000030/*/{pattern}"))[0]


def flip(path, position):
    """Flip the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
