"""The ranks of one process group, as far as checkpoints need them."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from dcp_resume.session.votes import Deadline, LonelyVotes, StoreVotes, Votes, VoteStore

__all__ = ["Ranks", "place_in_world"]

_POLL_TIMEOUT_S = 30
"""Every wait on the store is a short poll; this bounds a single request."""


class Ranks:
    """This rank among the others, and the rounds they hold.

    Uses one collective of the default group at construction, in the caller's thread: a random
    prefix is broadcast, so that a store that outlived an earlier incarnation (torchrun's agents
    keep theirs) cannot answer with its ballots. After that everything goes over own clones of the
    group's store.
    """

    def __init__(self) -> None:
        self._counter = 0
        self._store: VoteStore | None = None
        self.rank, self.world_size = place_in_world()
        self._group = _default_group()
        if self.world_size > 1:
            store = cast("Any", dist.distributed_c10d._get_default_store()).clone()
            store.set_timeout(timedelta(seconds=_POLL_TIMEOUT_S))
            self._store = store
            self._prefix = f"dcp_resume/{_shared_token()}"

    @property
    def are_current(self) -> bool:
        """Whether the default process group is still the one they were made in."""
        now = _default_group()
        if self._group is None or now is None:
            return self._group is now
        return self._group() is now()

    def votes(self, *, step: int, deadline_s: float) -> Votes:
        """Rounds for one session. Call it equally often on every rank."""
        if self._store is None:
            return LonelyVotes()
        self._counter += 1
        return StoreVotes(
            self._store,
            f"{self._prefix}/{self._counter}",
            rank=self.rank,
            world_size=self.world_size,
            step=step,
            deadline=Deadline(deadline_s),
        )

    def board(self) -> tuple[VoteStore, str]:
        """A store that all ranks share, and the beginning of keys that nobody has used there.

        Call it equally often on every rank.
        """
        if self._store is None:
            return cast("Any", dist).HashStore(), "alone"
        self._counter += 1
        return self._store, f"{self._prefix}/{self._counter}"


def place_in_world() -> tuple[int, int]:
    """This rank and the number of ranks, of the default process group; (0, 1) without one."""
    is_set_up = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_set_up else (0, 1)


def _default_group() -> Callable[[], object] | None:
    """A weak reference, so that a group that was destroyed goes away; None without a group."""
    is_set_up = dist.is_available() and dist.is_initialized()
    return weakref.ref(dist.group.WORLD) if is_set_up else None


def _shared_token() -> str:
    is_cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_cuda else torch.device("cpu")
    token = torch.tensor(list(secrets.token_bytes(16)), dtype=torch.uint8, device=device)
    dist.broadcast(token, src=0)
    return bytes(token.tolist()).hex()
