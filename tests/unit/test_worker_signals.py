"""Data workers live through the signals that stop a job, so that the trainer can save."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dcp_resume.data import ResumableLoader, ResumableSampler, ignore_notices

NUM_SAMPLES = 64
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

greeted: list[int] = []


def greet(worker_id: int) -> None:
    greeted.append(worker_id)


class Pids(Dataset):
    """Says which process made each sample, and how often it was greeted."""

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        return torch.tensor([os.getpid(), len(greeted)])


def resumable() -> ResumableLoader:
    sampler = ResumableSampler(NUM_SAMPLES, global_batch=1, micro_batch=1)
    return ResumableLoader(Pids(), sampler, num_workers=1, worker_init_fn=greet)


def plain() -> DataLoader:
    return DataLoader(Pids(), num_workers=1, worker_init_fn=ignore_notices)


def facts(batches: Iterator[torch.Tensor]) -> list[int]:
    return next(batches).flatten().tolist()


@pytest.mark.parametrize(("make", "num_greetings"), [(resumable, 1), (plain, 0)])
def test_a_worker_that_is_signalled_goes_on(make, num_greetings):
    batches = iter(make())
    pid, _ = facts(batches)
    assert pid != os.getpid()
    for number in SIGNALS:
        os.kill(pid, number)
    rest = [batch.flatten().tolist() for batch in batches]

    assert rest == [[pid, num_greetings]] * (NUM_SAMPLES - 1)
