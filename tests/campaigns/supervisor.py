"""One start of the job under a supervisor: it kills by plan, hears reports, judges them.

Ranks are forked from a server that has torch loaded, so that a start takes tenths of a second.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.campaigns.job import Orders, run_rank
from tests.campaigns.judging import ENDINGS, Finding, Report, Start, judge
from tests.campaigns.kills import Plan
from tests.support.s3_server import S3Server

__all__ = ["Place", "Supervisor"]

_PRELOAD = ["torch", "torch.distributed", "s3fs", "tests.campaigns.job"]
_LATE_S = 10.0
"""How much longer than a rank's own watchdog the supervisor waits."""


@dataclass(frozen=True)
class Place:
    """Where the job's run lies."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    server: S3Server | None = None
    """The server to kill."""


class Rank:
    """One rank's process, and what it said so far."""

    def __init__(self, orders: Orders) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.pipe, theirs = context.Pipe(duplex=False)
        self.log = Path(orders.log_path)
        self.rank = orders.rank
        self.reports: list[Report] = []
        self.is_settled = False
        self.process = context.Process(target=run_rank, args=(orders, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self) -> Report | None:
        """The next report; None once the process has ended."""
        try:
            report: Report = json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.is_settled = True
            return None
        self.reports.append(report)
        self.is_settled = report["what"] in ENDINGS
        return report

    def all(self, what: str) -> list[Report]:
        return [report for report in self.reports if report["what"] == what]

    def end(self) -> None:
        while not self.is_settled and self.pipe.poll():
            self.hear()
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Supervisor:
    """Starts the job again and again at one place.

    Args:
        place: Where the run lies.
        deadline_s: Of the job's saves and loads.
        limit_s: After which a start hangs.
    """

    def __init__(self, place: Place, *, deadline_s: float, limit_s: float) -> None:
        # Each TCPStore client asks DNS for the name of its peer; where nobody answers, that takes
        # 5 s. The fork server and the ranks inherit this.
        os.environ["RES_OPTIONS"] = "attempts:0"
        os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
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
            _hear_once(ranks, end_s - time.monotonic())

    def _hear(self, ranks: list[Rank], is_enough: Callable[[], bool]) -> bool:
        """Hear reports until it is enough; False if it never is, or not before the limit."""
        end_s = time.monotonic() + self._limit_s + _LATE_S
        while not is_enough():
            left_s = end_s - time.monotonic()
            if left_s <= 0 or all(rank.is_settled for rank in ranks):
                return False
            _hear_once(ranks, left_s)
        return True


def _hear_once(ranks: list[Rank], timeout_s: float) -> None:
    by_pipe: dict[Any, Rank] = {rank.pipe: rank for rank in ranks if not rank.is_settled}
    for pipe in wait(list(by_pipe), timeout_s):
        by_pipe[pipe].hear()
