"""What the campaign of incarnations runs: ranks that take part in rounds, and one that only reads.

The processes outlive the rounds; each round has a manager of its own, which is a new incarnation.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, TextIO

import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, SaveMode, Settings, events
from dcp_resume.errors import DcpResumeError
from dcp_resume.storage import RetryPolicy
from tests.campaigns.calls import ignore_calls, watch_calls
from tests.campaigns.labelled_state import Label, LabelledState
from tests.campaigns.places import Place
from tests.campaigns.speakers import Reports

__all__ = ["AGAIN", "CLOSE", "Part", "ReadPart", "Seat", "Trap", "read_always", "serve_rounds"]

AGAIN, CLOSE = "again", "close"
"""What a rank that has paused is told: to save once more, or to end the round."""
_PHASES = {1: "agree", 2: "stage", 3: "write", 4: "commit", 5: "learn"}
_READ_PAUSE_S = 0.005


@dataclass(frozen=True)
class Seat:
    """Where a rank sits, for all rounds."""

    rank: int
    world_size: int
    store_port: int
    limit_s: float
    """After which one round, or one read, shows its stacks and ends the process."""
    log_path: str


@dataclass(frozen=True)
class Trap:
    """Where a rank dies or is stopped: at the ``count``-th call of a file from a save on."""

    rank: int
    save: int
    """Which save of the round, from 0."""
    file: str
    count: int
    is_deadly: bool


@dataclass(frozen=True)
class Part:
    """What one incarnation does in a round."""

    url: str
    storage_options: Mapping[str, Any]
    writer: int
    """What its states are labelled with."""
    request: int | str
    """What it resumes from."""
    waits: tuple[bool, ...]
    """A save each: whether to wait for its result before the next."""
    mode: SaveMode
    deadline_s: float
    trap: Trap | None = None
    is_counting: bool = False


@dataclass(frozen=True)
class ReadPart:
    """What is read, until the next order."""

    url: str
    storage_options: Mapping[str, Any]

    @staticmethod
    def of(place: Place) -> ReadPart:
        """Of a place."""
        return ReadPart(place.url, place.storage_options)


def serve_rounds(seat: Seat, pipe: Connection) -> None:
    """Main function of a rank's process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seat.limit_s)
    store = dist.TCPStore("127.0.0.1", seat.store_port, is_master=False, timeout=timeout)
    rank, world_size = seat.rank, seat.world_size
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    report = Reports(pipe)
    with open(seat.log_path, "w") as log, contextlib.suppress(EOFError):
        while True:
            part: Part = pipe.recv()
            faulthandler.dump_traceback_later(seat.limit_s, exit=True, file=log)
            _answer_for(_Incarnation(part, report, pipe).live, report)
            faulthandler.cancel_dump_traceback_later()
            report("ended")


def _answer_for(work: Any, report: Reports) -> None:
    try:
        work()
    except DcpResumeError as error:
        report("error", type=type(error).__name__, message=str(error)[:2000])
    except BaseException:
        report("untyped", trace=traceback.format_exc()[-3000:])


class _Incarnation:
    """One rank of one incarnation."""

    def __init__(self, part: Part, report: Reports, pipe: Connection) -> None:
        self._part = part
        self._report = report
        self._pipe = pipe
        self._rank = dist.get_rank()
        self._save = -1
        self._calls: list[Counter[str]] = [Counter() for _ in part.waits]
        trap = part.trap
        self._left = trap.count if trap is not None and trap.rank == self._rank else 0

    def live(self) -> None:
        """Resume, save, and end when told to."""
        part = self._part
        settings = Settings(
            mode=part.mode,
            deadline_s=part.deadline_s,
            storage_options=part.storage_options,
            retry=RetryPolicy(deadline_s=part.deadline_s),
        )
        with self._watched(), CheckpointManager(part.url, settings) as checkpoints:
            state = LabelledState()
            result = checkpoints.resume(state.leaves, part.request)
            if result is not None:
                self._report("resumed", seq=result.seq, label=_shown(state.label()))
            step = result.step if result else 0
            for is_waiting in part.waits:
                self._save += 1
                step += 1
                state.become(Label(part.writer, step))
                pending = checkpoints.save(step, state.leaves)
                if is_waiting or part.mode is SaveMode.BLOCKING:
                    self._acknowledge(pending.result())
            if checkpoints.pending is not None:
                self._acknowledge(checkpoints.pending.result())
            self._report("paused", calls=self._calls if part.is_counting else [])
            if self._pipe.recv() == AGAIN:
                self._left = 0  # the round is over: a trap that did not spring is taken up
                state.become(Label(part.writer, step + 1))
                self._acknowledge(checkpoints.save(step + 1, state.leaves).result())

    def _acknowledge(self, saved: Any) -> None:
        self._report("saved", seq=saved.seq, step=saved.step)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        unsubscribe = events.subscribe(self._hear)
        if self._left or self._part.is_counting:
            watch_calls(self._see)
        try:
            yield
        finally:
            ignore_calls()
            unsubscribe()

    def _hear(self, event: events.Event) -> None:
        if isinstance(event, events.RunOpened):
            self._report("opened", generation=event.generation)
        elif isinstance(event, events.StepReached):
            self._report("place", name=_PHASES[event.number])
        elif isinstance(event, events.CheckpointCommitted):
            self._report("committed", step=event.step)

    def _see(self, file: str, line: int) -> None:
        trap, save = self._part.trap, self._save
        if save < 0:
            return
        if self._part.is_counting:
            self._calls[save][file] += 1
        if self._left > 0 and trap is not None and save >= trap.save and file == trap.file:
            self._left -= 1
            if self._left == 0:
                self._report("trapped", name=f"{file}:{line}")
                if trap.is_deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                self._pipe.recv()  # the campaign stops the whole process here, and wakes it


def read_always(limit_s: float, log_path: str, pipe: Connection) -> None:
    """Main function of the reader's process: after each order, read until the next comes."""
    torch.set_num_threads(1)
    report = Reports(pipe)
    with open(log_path, "w") as log, contextlib.suppress(EOFError):
        while True:
            part: ReadPart = pipe.recv()
            _answer_for(lambda part=part: _read_on(part, report, pipe, limit_s, log), report)


def _read_on(
    part: ReadPart, report: Reports, pipe: Connection, limit_s: float, log: TextIO
) -> None:
    settings = Settings(storage_options=part.storage_options)
    state = LabelledState()
    with CheckpointManager(part.url, settings) as checkpoints:
        while not pipe.poll(_READ_PAUSE_S):
            faulthandler.dump_traceback_later(limit_s, exit=True, file=log)
            before = checkpoints.history()
            if before.newest() is not None:
                latest = checkpoints.latest()
                seq = checkpoints.load(state.leaves).seq
                after = checkpoints.history()
                label = _shown(state.label())
                span = [before.last_seq, after.last_seq]
                generations = [before.generation, after.generation]
                facts = {"live": generations, "latest": latest, "seq": seq, "label": label}
                report("read", url=part.url, span=span, **facts)
            faulthandler.cancel_dump_traceback_later()


def _shown(label: Label | None) -> list[int] | None:
    return None if label is None else [label.writer, label.step]
