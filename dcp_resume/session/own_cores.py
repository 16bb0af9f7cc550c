"""How many of its host's cores a rank may count on."""

from __future__ import annotations

import os

import torch.distributed as dist

__all__ = ["own_cores"]


def own_cores() -> int:
    """This process's cores, shared evenly with the other ranks of its host; at least 1.

    A launcher says how many ranks a host has. Where none does, all ranks may be on this one.
    """
    can_ask = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    if told.isdecimal():
        return max(1, cores // max(1, int(told)))
    is_alone = not (dist.is_available() and dist.is_initialized())
    return max(1, cores // (1 if is_alone else dist.get_world_size()))
