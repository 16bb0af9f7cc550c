"""The job that the campaign kills: a few ranks that resume, save, load, and report each step.

Its state after a step is a function of the step alone, so that whoever resumes can tell whether it
got exactly the state of that step. World sizes differ between starts: every resume may reshard.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dcp_resume import CheckpointManager, SaveMode, Settings, events
from dcp_resume.errors import DcpResumeError
from dcp_resume.storage import RetryPolicy
from tests.campaigns.calls import watch_calls
from tests.campaigns.speakers import Reports

__all__ = ["KEEP", "Orders", "SelfKill", "run_rank"]

KEEP = 3
"""Checkpoints that remain after a commit."""
_ROWS, _COLUMNS = 96, 512
_NO_STEP = -7
"""A state that no step has."""


@dataclass(frozen=True)
class SelfKill:
    """SIGKILL to the rank itself, at the ``count``-th call made by one file of the library."""

    rank: int
    file: str
    count: int


@dataclass(frozen=True)
class Orders:
    """What one rank of one start of the job is told."""

    url: str
    rank: int
    world_size: int
    store_port: int
    """Where the process group's store listens; 0 for the rank that is to host it."""
    seed: int
    deadline_s: float
    limit_s: float
    """After which a rank that is still at work shows its stacks and exits."""
    log_path: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    kill: SelfKill | None = None
    is_counting: bool = False
    """Whether calls are counted by file, for later kills."""


class _Job(Reports):
    """Reports what the campaign needs of the library's events, too."""

    def hear(self, event: events.Event) -> None:
        """Subscribed to them."""
        if isinstance(event, events.StepReached):
            names = {1: "agree", 2: "stage", 3: "write", 4: "commit", 5: "learn"}
            self("place", name=f"save: {names[event.number]}")
        elif isinstance(event, events.CheckpointCommitted):
            self("durable", step=event.step)
            self("place", name="retention")
        elif isinstance(event, events.CheckpointSkipped):
            self("skipped", step=event.step, reason=event.reason)
        elif isinstance(event, events.RetentionFailed):
            self("unswept", step=event.step, reason=event.reason)
        elif isinstance(event, events.StorageRetried):
            self("retried")


def run_rank(orders: Orders, pipe: Connection) -> None:
    """Main function of a rank's process."""
    report = _Job(pipe)
    with open(orders.log_path, "w") as log:
        faulthandler.dump_traceback_later(orders.limit_s, exit=True, file=log)
        try:
            _join(orders, report)
            _train(orders, report)
        except BaseException:
            report("untyped", trace=traceback.format_exc()[-3000:])
    # No clean end: a background save of a job that failed would be waited for.
    os._exit(0)


def _join(orders: Orders, report: _Job) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=orders.limit_s)
    host, is_host = "127.0.0.1", orders.store_port == 0
    store = dist.TCPStore(
        host, orders.store_port, is_master=is_host, wait_for_workers=False, timeout=timeout
    )
    if is_host:
        report("port", port=store.port)
    rank, world_size = orders.rank, orders.world_size
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def _train(orders: Orders, report: _Job) -> None:
    rng = random.Random(orders.seed)  # alike on all ranks
    is_blocking = rng.random() < 0.5
    settings = Settings(
        mode=SaveMode.BLOCKING if is_blocking else SaveMode.BACKGROUND,
        max_checkpoint_keep=KEEP,
        deadline_s=orders.deadline_s,
        storage_options=orders.storage_options,
        retry=RetryPolicy(deadline_s=orders.deadline_s),
    )
    state = _State()
    events.subscribe(report.hear)
    checkpoints = CheckpointManager(orders.url, settings)
    report("ready", is_blocking=is_blocking)
    calls: Counter[str] = Counter()
    _watch(orders, calls, report)
    try:
        step = _resume(checkpoints, state, report)
        for _ in range(rng.randint(2, 5)):
            step += 1
            state.become(step)
            pending = checkpoints.save(step, state.leaves)
            if is_blocking or rng.random() < 0.5:
                report("durable", step=pending.result().step)
            if rng.random() < 0.35:
                asked = "latest" if step < 2 or rng.random() < 0.5 else step - 1
                report("place", name="load")
                found = checkpoints.load(state.leaves, asked).step
                report("loaded", step=found, is_exact=state.is_at(found))
        checkpoints.close()
    except DcpResumeError as error:
        report("error", type=type(error).__name__, message=str(error)[:2000])
        return
    report("finished", calls=calls if orders.is_counting else {})
    signal.pause()  # at rest, until it is killed


def _resume(checkpoints: CheckpointManager, state: _State, report: _Job) -> int:
    report("place", name="resume")
    result = checkpoints.resume(state.leaves)
    step = result.step if result else 0
    report("resumed", step=step, is_exact=result is None or state.is_at(step))
    return step


class _State:
    """A sharded tensor, a replicated one, and values."""

    def __init__(self) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        rows = _ROWS // world_size
        self._rows = slice(rank * rows, (rank + 1) * rows)
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
        self._local = torch.empty(rows, _COLUMNS)
        shape, stride = torch.Size((_ROWS, _COLUMNS)), (_COLUMNS, 1)
        whole = DTensor.from_local(
            self._local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        self._norm = torch.empty(64)
        self._trainer: dict[str, Any] = {}
        self.leaves = {"model": {"w": whole, "norm": self._norm}, "trainer": self._trainer}
        self.become(_NO_STEP)

    def become(self, step: int) -> None:
        """Change every leaf in place to what it is after ``step``."""
        self._local.copy_(_whole_at(step)[self._rows])
        self._norm.fill_(step)
        self._trainer.update(step=step, seen=[step, 64 * step])

    def is_at(self, step: int) -> bool:
        """Whether every leaf is what it is after ``step``."""
        is_local_exact = torch.equal(self._local, _whole_at(step)[self._rows])
        is_norm_exact = torch.equal(self._norm, torch.full((64,), float(step)))
        is_trainer_exact = self._trainer == {"step": step, "seen": [step, 64 * step]}
        return is_local_exact and is_norm_exact and is_trainer_exact


def _whole_at(step: int) -> torch.Tensor:
    numbers = torch.arange(_ROWS * _COLUMNS, dtype=torch.float32).reshape(_ROWS, _COLUMNS)
    return numbers + 1000 * step  # below 2 ** 24: exact


def _watch(orders: Orders, calls: Counter[str], report: Reports) -> None:
    kill = orders.kill if orders.kill and orders.kill.rank == orders.rank else None
    if kill is None and not orders.is_counting:
        return
    left = kill.count if kill else 0

    def see(file: str, line: int) -> None:
        nonlocal left
        if orders.is_counting:
            calls[file] += 1
        if kill is not None and file == kill.file:
            left -= 1
            if left == 0:
                report("dying", name=f"{file}:{line}")
                os.kill(os.getpid(), signal.SIGKILL)

    watch_calls(see)
