"""The ranks of one process group, as far as checkpoints need them."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist

from dcp_resume.session.bounded_store import ANSWER_S, BoundedStore, Requests, Waiters
from dcp_resume.session.votes import (
    VERDICT_GRACE,
    Deadline,
    LonelyVotes,
    StoreVotes,
    Votes,
    VoteStore,
)

__all__ = ["Ranks", "place_in_world"]

_REQUEST_S = 30.0
"""Within which the store answers a vote to stop, which has no deadline before it begins."""


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
            self._store = cast("Any", dist.distributed_c10d._get_default_store()).clone()
            self._requests = Requests()
            self._waiters = Waiters(cast("Any", self._store))
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
        deadline = Deadline(deadline_s)
        store = BoundedStore(
            self._store,
            self._requests,
            lambda: max(deadline.left_s(VERDICT_GRACE), ANSWER_S),
        )
        return StoreVotes(
            store,
            self._waiters.wait,
            f"{self._prefix}/{self._counter}",
            rank=self.rank,
            world_size=self.world_size,
            step=step,
            deadline=deadline,
        )

    def board(self) -> tuple[VoteStore, str]:
        """A store that all ranks share, and the beginning of keys that nobody has used there.

        Call it equally often on every rank.
        """
        if self._store is None:
            return cast("Any", dist).HashStore(), "alone"
        self._counter += 1
        store = BoundedStore(self._store, self._requests, lambda: _REQUEST_S)
        return store, f"{self._prefix}/{self._counter}"


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
