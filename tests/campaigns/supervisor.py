"""One start of the job under a supervisor: it kills by plan, hears reports, judges them."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from tests.campaigns.job import Orders, run_rank
from tests.campaigns.judging import ENDINGS, Finding, Start, judge
from tests.campaigns.kills import Plan
from tests.campaigns.places import Place
from tests.campaigns.speakers import Speaker, hear_once, prepare_fork_server

__all__ = ["Supervisor"]

_LATE_S = 10.0
"""How much longer than a rank's own watchdog the supervisor waits."""


class Rank(Speaker):
    """One rank's process."""

    def __init__(self, orders: Orders) -> None:
        super().__init__(run_rank, (orders,), ENDINGS)
        self.log = Path(orders.log_path)
        self.rank = orders.rank


class Supervisor:
    """Starts the job again and again at one place.

    Args:
        place: Where the run lies.
        deadline_s: Of the job's saves and loads.
        limit_s: After which a start hangs.
    """

    def __init__(self, place: Place, *, deadline_s: float, limit_s: float) -> None:
        prepare_fork_server()
        self._place = place
        self._deadline_s = deadline_s
        self._limit_s = limit_s
        self._floor = 0

    @property
    def floor(self) -> int:
        """Highest step that was ever acknowledged as durable."""
        return self._floor

    def start(self, plan: Plan, *, is_counting: bool = False) -> Start:
        """Start the job, kill it by the plan, and judge what was heard."""
        start = Start(plan)
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="campaign-") as logs:
            ranks = list(self._launch(plan, Path(logs), is_counting))
            killed_s = self._carry_out(plan, ranks)
            is_hanging = not self._hear(ranks, lambda: all(r.is_settled for r in ranks))
            for rank in ranks:
                rank.end()
            stacks = "\n".join(rank.log.read_text(errors="replace") for rank in ranks)
            if is_hanging or stacks.strip():
                start.findings.append(Finding("hang", stacks[-6000:]))
        judge(start, ranks, killed_s, self._floor)
        self._floor = max(self._floor, start.durable)
        start.duration_s = time.monotonic() - began_s
        return start

    def _launch(self, plan: Plan, logs: Path, is_counting: bool) -> Iterator[Rank]:
        def launch(rank: int, port: int) -> Rank:
            orders = Orders(
                url=self._place.url,
                rank=rank,
                world_size=plan.world_size,
                store_port=port,
                seed=plan.seed,
                deadline_s=self._deadline_s,
                limit_s=self._limit_s,
                log_path=str(logs / str(rank)),
                storage_options=self._place.storage_options,
                kill=plan.at_call,
                is_counting=is_counting,
            )
            return Rank(orders)

        if plan.is_store_at_rank_0:
            first = launch(0, 0)
            self._hear([first], lambda: bool(first.all("port")))
            port = first.all("port")[0]["port"]
        else:
            timeout = timedelta(seconds=self._limit_s)
            self._store = dist.TCPStore(
                "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout
            )
            port = self._store.port
            first = launch(0, port)
        yield first
        for rank in range(1, plan.world_size):
            yield launch(rank, port)

    def _carry_out(self, plan: Plan, ranks: list[Rank]) -> float:
        """Kill by plan; returns the instant of the kill, or infinity where none came."""
        self._hear(ranks, lambda: all(r.all("ready") or r.is_settled for r in ranks))
        if plan.at_call is not None:
            victim = ranks[plan.at_call.rank]
            self._hear(ranks, lambda: bool(victim.all("dying")) or victim.is_settled)
            dying = victim.all("dying")
            if dying:
                self._kill(plan, ranks)
            return float(dying[0]["at_s"]) if dying else math.inf
        self._hear_for(plan.after_s, ranks)
        killed_s = time.monotonic()
        if plan.is_server_killed:
            assert self._place.server is not None
            self._place.server.kill()
            self._hear_for(plan.pause_s, ranks)
            self._place.server.restart()
        else:
            self._kill(plan, ranks)
        return killed_s

    def _kill(self, plan: Plan, ranks: list[Rank]) -> None:
        for victim in plan.victims:
            ranks[victim].process.kill()

    def _hear_for(self, duration_s: float, ranks: list[Rank]) -> None:
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            hear_once(ranks, end_s - time.monotonic())

    def _hear(self, ranks: list[Rank], is_enough: Callable[[], bool]) -> bool:
        """Hear reports until it is enough; False if it never is, or not before the limit."""
        end_s = time.monotonic() + self._limit_s + _LATE_S
        while not is_enough():
            left_s = end_s - time.monotonic()
            if left_s <= 0 or all(rank.is_settled for rank in ranks):
                return False
            hear_once(ranks, left_s)
        return True
