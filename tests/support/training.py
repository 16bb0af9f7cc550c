"""The trainer of ``examples/``, run by the pool's ranks instead of torchrun."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
import train
from flags import parse_flags
from torch.distributed.tensor import DTensor

__all__ = ["TINY", "digest_of", "digests_after", "losses_of", "train_rank", "whole"]

TINY = "--sequence_length 16 --batch_size 2 --total_batch_size 64 --warmup 5"


def train_rank(command: str) -> train.Trainer:
    """One rank's whole training with the flags of a command line."""
    with _as_in_a_process_of_its_own(), redirect_stdout(io.StringIO()):
        args = parse_flags("", shlex.split(command))
        train.make_exact()
        return train.train(args)


def digests_after(command: str) -> dict[str, str]:
    """Train; name → digest of each whole parameter and moment of which this rank then has a part.

    Without a step to do, those that were loaded.
    """
    trainer = train_rank(command)
    digests = {}
    for stage, optimizer in zip(trainer.model.stages, trainer.optimizers, strict=True):
        for name, parameter in stage.named_parameters():
            digests[name] = digest_of(parameter)
            for slot, moment in optimizer.state[parameter].items():
                digests[f"{name}/{slot}"] = digest_of(moment)
    return digests


def digest_of(tensor: torch.Tensor) -> str:
    data = whole(tensor).contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; every rank that holds a part must ask."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def losses_of(path: Path) -> dict[int, float]:
    """Step → loss, to the last bit, as the trainer logged them."""
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines())}


@contextmanager
def _as_in_a_process_of_its_own() -> Iterator[None]:
    """The rank serves other tests afterwards, some of which look at torch's switches."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    num_threads = torch.get_num_threads()
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())  # as torchrun sets it
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        torch.use_deterministic_algorithms(is_deterministic)
        torch.set_num_threads(num_threads)
