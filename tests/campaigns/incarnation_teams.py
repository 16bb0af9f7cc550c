"""Two teams of ranks and a reader that outlive a round; and hearing them until it is over."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.campaigns.incarnation_job import (
    AGAIN,
    CLOSE,
    Part,
    ReadPart,
    Seat,
    Trap,
    read_always,
    serve_rounds,
)
from tests.campaigns.incarnation_rounds import WORLD_SIZE
from tests.campaigns.places import Place
from tests.campaigns.speakers import Report, Speaker, hear_once, prepare_fork_server

__all__ = ["Hang", "Reader", "Stage", "Team"]

_LATE_S = 10.0
"""How much longer than a process's own watchdog the campaign waits."""


class Hang(Exception):
    """Something did not end by the limit; the message has the stacks."""


class Team:
    """The ranks of one incarnation after another: replaced when one of them died."""

    def __init__(self, directory: Path, limit_s: float) -> None:
        self._directory = directory
        self._limit_s = limit_s
        self.ranks: list[Speaker] = []
        self._logs: list[Path] = []
        self.asleep: set[int] = set()
        self.dead: set[int] = set()
        """Ranks that were killed in this round."""
        self.trapped_s: float | None = None
        self.woken_s: float | None = None
        self.again_s: float | None = None

    def begin(self, part: Part) -> None:
        """Start a round; for a team that is not whole, with new processes."""
        if not self.ranks:
            self._seat()
        self.trapped_s = self.woken_s = self.again_s = None
        self.dead.clear()
        for rank in self.ranks:
            rank.reports.clear()
            rank.is_settled = False
            rank.pipe.send(part)

    def _seat(self) -> None:
        timeout = timedelta(seconds=self._limit_s)
        self._store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout
        )
        for number in range(WORLD_SIZE):
            descriptor, log = tempfile.mkstemp(dir=self._directory)
            os.close(descriptor)
            self._logs.append(Path(log))
            seat = Seat(number, WORLD_SIZE, self._store.port, self._limit_s, log)
            self.ranks.append(Speaker(serve_rounds, [seat], {"ended"}))

    def all(self, what: str) -> list[Report]:
        """Reports of one kind, of all ranks."""
        return [report for rank in self.ranks for report in rank.all(what)]

    @property
    def generation(self) -> int:
        """That it opened; 0 if it never said so."""
        return max((report["generation"] for report in self.all("opened")), default=0)

    @property
    def is_quiet(self) -> bool:
        """Whether every rank has ended, or waits for a word."""
        return all(
            rank.is_settled or (rank.reports and rank.reports[-1]["what"] == "paused")
            for rank in self.ranks
        )

    @property
    def is_fit(self) -> bool:
        """Whether the same processes may play another round: none died, or lost the others."""
        kinds = {report["type"] for report in self.all("error")}
        are_alive = all(rank.process.is_alive() for rank in self.ranks)
        return are_alive and kinds <= {"Fenced"} and not self.all("untyped")

    def overtake(self, trap: Trap, is_whole: bool) -> None:
        """The trap has sprung: hit the other ranks too, if they are to be."""
        self.trapped_s = float(self.all("trapped")[0]["at_s"])
        victims = range(WORLD_SIZE) if is_whole else (trap.rank,)
        if trap.is_deadly:
            for number in victims:
                self.ranks[number].process.kill()
            self.dead.update(victims)
            return
        for number in victims:
            os.kill(self.ranks[number].process.pid or 0, signal.SIGSTOP)
        self.asleep.update(victims)
        self._waiting = self.ranks[trap.rank]

    def wake(self) -> None:
        """Let those that sleep go on."""
        if not self.asleep:
            return
        self._waiting.pipe.send("awake")
        self.woken_s = time.monotonic()
        for number in self.asleep:
            os.kill(self.ranks[number].process.pid or 0, signal.SIGCONT)
        self.asleep.clear()

    def tell(self, word: str) -> None:
        """Answer the ranks that wait."""
        for rank in self.ranks:
            if not rank.is_settled:
                rank.reports.append({"what": "told", "word": word})
                rank.pipe.send(word)

    def disband(self) -> str:
        """End all ranks; returns what their watchdogs wrote."""
        self.wake()
        for rank in self.ranks:
            rank.end()
        stacks = "\n".join(log.read_text(errors="replace") for log in self._logs)
        self.ranks, self._logs = [], []
        return stacks


class Reader(Speaker):
    """The process that reads all the time."""

    def __init__(self, directory: Path, limit_s: float) -> None:
        self.log = directory / "reader"
        super().__init__(read_always, [limit_s, str(self.log)], {"error", "untyped"})

    def turn_to(self, place: Place) -> None:
        """Read another run from now on."""
        self.pipe.send(ReadPart.of(place))
        self.reports.clear()


class Stage:
    """Everybody together; use it as a context.

    Args:
        limit_s: After which a round hangs.
    """

    def __init__(self, limit_s: float) -> None:
        prepare_fork_server()
        self.limit_s = limit_s
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        directory = tempfile.TemporaryDirectory(prefix="campaign-")
        self._directory = Path(self._stack.enter_context(directory))
        self.teams = (Team(self._directory, self.limit_s), Team(self._directory, self.limit_s))
        for team in self.teams:
            self._stack.callback(team.disband)
        self.reader = Reader(self._directory, self.limit_s)
        self._stack.callback(lambda: self.reader.end())
        return self

    def renew_reader(self, place: Place) -> None:
        """After its end."""
        self.reader.end()
        self.reader = Reader(self._directory, self.limit_s)
        self.reader.turn_to(place)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def hear_until(self, is_enough: Callable[[], bool], *, for_s: float | None = None) -> None:
        """Hear reports until it is enough, or for so long.

        Raises:
            Hang: It is not enough by the limit.
        """
        end_s = time.monotonic() + (self.limit_s + _LATE_S if for_s is None else for_s)
        while not is_enough():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                if for_s is None:
                    raise Hang("nobody goes on")
                return
            speakers = [self.reader, *self.teams[0].ranks, *self.teams[1].ranks]
            hear_once(speakers, left_s)

    def close_round(self) -> None:
        """With both quiet: the older one saves once more, and must be refused; then all end."""
        older, newer = sorted(self.teams, key=lambda team: team.generation)
        older.again_s = time.monotonic()
        older.tell(AGAIN)
        self.hear_until(lambda: all(rank.is_settled for rank in older.ranks))
        newer.tell(CLOSE)
        self.hear_until(lambda: all(rank.is_settled for rank in newer.ranks))
