"""The trainer of ``examples/``, run by the pool's ranks instead of torchrun."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # as for a script; in the pool's ranks too

__all__ = ["EXAMPLES", "train_rank"]


def train_rank(command: str) -> Any:
    """One rank's whole training with the flags of a command line; returns its ``Trainer``."""
    import train
    from flags import parse_flags

    with _as_in_a_process_of_its_own(), redirect_stdout(io.StringIO()):
        args = parse_flags("", shlex.split(command))
        train.make_exact()
        return train.train(args)


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
