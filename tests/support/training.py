"""The trainer of ``examples/``, run by the pool's ranks instead of torchrun."""

from __future__ import annotations

import io
import os
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist

EXAMPLES = Path(__file__).parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # as for a script; in the pool's ranks too

__all__ = ["EXAMPLES", "train_rank"]


def train_rank(command: str) -> Any:
    """One rank's whole training with the flags of a command line; returns its ``Trainer``."""
    import train
    from flags import parse_flags

    os.environ["WORLD_SIZE"] = str(dist.get_world_size())  # as torchrun sets it
    try:
        args = parse_flags("", shlex.split(command))
    finally:
        del os.environ["WORLD_SIZE"]
    train.make_exact()
    with redirect_stdout(io.StringIO()):
        return train.train(args)
