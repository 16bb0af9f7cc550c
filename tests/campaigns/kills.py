"""Who is killed, and at which instant: drawn from a seed, so that a campaign can be replayed.

A kill from inside is exact: the rank dies between two given calls of the library. One from outside
comes after a drawn delay, whatever the ranks are doing then.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tests.campaigns.job import SelfKill

__all__ = ["Census", "Plan", "draw_plan"]

Census = Mapping[tuple[bool, str], int]
"""(Is it rank 0, file of the library) → calls in an undisturbed start."""

_MAX_WORLD_SIZE = 3
_AIMS = (
    ("session/save", "session/writing", "session/attempt", "session/commit", "session/documents"),
    ("manager/retention", "session/sweep", "session/litter", "session/marks"),
    ("session/load", "session/reading", "session/opening", "session/ownership"),
    ("session/run_log", "storage/"),
    ("",),
)
"""Beginnings of files; each aim is as likely, however few calls its files make."""


@dataclass(frozen=True)
class Plan:
    """One start of the job, and its end."""

    seed: int
    """Of what the job does."""
    world_size: int
    is_store_at_rank_0: bool
    """Whether the vote store dies with rank 0, as without torchrun's agent."""
    victims: tuple[int, ...]
    """Ranks that die; of several, the others just after the first."""
    at_call: SelfKill | None = None
    """The exact instant; None for ``after_s``."""
    after_s: float = 0.0
    """Seconds after the ranks are ready."""
    is_server_killed: bool = False
    """Whether the S3 server dies after ``after_s``, instead of ranks."""
    pause_s: float = 0.0
    """Before the server starts again."""


def draw_plan(rng: random.Random, census: Census, span_s: float, *, server_share: float) -> Plan:
    """Draw one.

    Args:
        rng: Where from.
        census: What can be aimed at from inside.
        span_s: How long an undisturbed start takes, for kills from outside.
        server_share: Share of kills that hit the S3 server.
    """
    seed, world_size = rng.getrandbits(32), rng.randint(2, _MAX_WORLD_SIZE)
    is_store_at_rank_0 = rng.random() < 0.3
    if rng.random() < server_share:
        after_s, pause_s = rng.uniform(0, span_s), rng.uniform(0, 1)
        return Plan(seed, world_size, is_store_at_rank_0, (), None, after_s, True, pause_s)
    first = rng.randrange(world_size)
    victims = (first,) if rng.random() < 0.55 else tuple(range(world_size))
    if rng.random() < 0.3:
        after_s = rng.uniform(0, span_s)
        return Plan(seed, world_size, is_store_at_rank_0, victims, None, after_s)
    at_call = _draw_call(rng, census, first)
    return Plan(seed, world_size, is_store_at_rank_0, victims, at_call)


def _draw_call(rng: random.Random, census: Census, rank: int) -> SelfKill:
    files = sorted(file for is_rank_0, file in census if is_rank_0 == (rank == 0))
    aim = rng.choice(_AIMS)
    aimed = [file for file in files if file.startswith(aim)] or files
    file = rng.choice(aimed)
    return SelfKill(rank, file, 1 + int(rng.random() * census[rank == 0, file]))
