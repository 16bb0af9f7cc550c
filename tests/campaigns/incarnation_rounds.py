"""What two incarnations do in a round, and when: drawn from a seed, so that it can be replayed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from dcp_resume import SaveMode
from tests.campaigns.incarnation_job import Trap

__all__ = ["WORLD_SIZE", "Calls", "Fate", "Plan", "Side", "draw_round"]

WORLD_SIZE = 2
"""Ranks of an incarnation."""
MAX_SAVES = 3

Calls = Mapping[tuple[int, int], Mapping[str, int]]
"""(Rank, save) → file of the library → calls that it makes in an undisturbed save."""

_AIMS = (
    ("session/save", "session/writing", "session/attempt", "session/documents"),
    ("session/commit", "session/run_log"),
    ("storage/",),
    ("",),
)
"""Beginnings of files; each aim is as likely, however few calls its files make."""


class Fate(Enum):
    """What becomes of the incarnation that begins first."""

    GOES_ON = "goes on"
    STOPPED = "stopped in a save, and woken"
    KILLED = "killed in a save"


@dataclass(frozen=True)
class Side:
    """What one incarnation does of its own."""

    mode: SaveMode
    waits: tuple[bool, ...]
    """A save each: whether to wait for its result before the next."""


@dataclass(frozen=True)
class Plan:
    """One round."""

    first_team: int
    """Which of the two teams begins; the other one succeeds it."""
    sides: tuple[Side, Side]
    """Of the first, and of its successor."""
    fate: Fate
    trap: Trap | None
    """Where the first one's fate overtakes it."""
    is_whole: bool
    """Whether all of its ranks are stopped or killed, or only the trapped one."""
    offset_s: float
    """From the start of the first to that of its successor."""
    is_rolled_back: bool
    """Whether the first resumes from an older step, and its successor waits until it has opened."""
    is_awaiting_trap: bool
    """Whether the successor starts as soon as the first is trapped, rather than at the offset."""
    choice: float
    """In [0, 1): which of the older steps."""


def draw_round(rng: random.Random, calls: Calls, span_s: float) -> Plan:
    """Draw one.

    Args:
        rng: Where from.
        calls: What traps can be laid at.
        span_s: How long an undisturbed incarnation takes.
    """
    sides = (_draw_side(rng), _draw_side(rng))
    fate = rng.choice(list(Fate))
    trap = None if fate is Fate.GOES_ON else _draw_trap(rng, calls, sides[0], fate)
    return Plan(
        first_team=rng.randrange(2),
        sides=sides,
        fate=fate,
        trap=trap,
        is_whole=rng.random() < 0.6,
        offset_s=rng.choice((0.0, rng.uniform(0, span_s))),
        is_rolled_back=rng.random() < 0.3,
        is_awaiting_trap=trap is not None and rng.random() < 0.5,
        choice=rng.random(),
    )


def _draw_side(rng: random.Random) -> Side:
    num_saves = rng.randint(1, MAX_SAVES)
    return Side(rng.choice(list(SaveMode)), tuple(rng.random() < 0.5 for _ in range(num_saves)))


def _draw_trap(rng: random.Random, calls: Calls, side: Side, fate: Fate) -> Trap:
    rank, save = rng.randrange(WORLD_SIZE), rng.randrange(len(side.waits))
    made = calls[rank, save]
    aim = rng.choice(_AIMS)
    file = rng.choice(sorted(file for file in made if file.startswith(aim)) or sorted(made))
    return Trap(rank, save, file, 1 + int(rng.random() * made[file]), fate is Fate.KILLED)


def older_step(steps: Sequence[int], choice: float) -> int | None:
    """One of the steps below the newest; None if there is none."""
    older = sorted({step for step in steps if step < max(steps)}) if steps else []
    return older[int(choice * len(older))] if older else None
