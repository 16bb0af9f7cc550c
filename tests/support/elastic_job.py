"""A job for torchrun elastic: saves after every step, notes what it meets, and can be held.

    torchrun --nnodes 2:4 ... tests/support/elastic_job.py DIRECTORY URL

Its state after a step is a function of the step, so that whoever resumes can tell whether it got
exactly that step. Whoever supervises it reads ``DIRECTORY/notes/HOST.jsonl``, and writes:

* ``hold-HOST`` with a number: the next save there that reaches this step of its own waits, until
  the file is gone;
* ``finish``: the job ends after the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dcp_resume import CheckpointManager, SaveMode, Settings, events
from dcp_resume.errors import DcpResumeError
from dcp_resume.storage import RetryPolicy

ROWS, COLUMNS = 12, 16
"""Rows divide by every world of up to four."""
NO_STEP = -1
"""A state that no step has."""


class Notes:
    """Lines of JSON that outlive their writer."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "notes" / f"{socket.gethostname()}.jsonl"
        self._path.parent.mkdir(exist_ok=True)

    def __call__(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "at_s": time.monotonic(), "pid": os.getpid(), **facts})
        with self._path.open("a") as file:
            file.write(line + "\n")


class State:
    """A sharded tensor, a replicated one, and values."""

    def __init__(self) -> None:
        rows = ROWS // dist.get_world_size()
        self._rows = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
        self._local = torch.empty(rows, COLUMNS)
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
        whole = DTensor.from_local(self._local, mesh, [Shard(0)], run_check=False)
        self._norm = torch.empty(COLUMNS)
        self._trainer: dict[str, Any] = {}
        self.leaves = {"model": {"w": whole, "norm": self._norm}, "trainer": self._trainer}
        self.become(NO_STEP)

    def become(self, step: int) -> None:
        """Change every leaf in place to what it is after ``step``."""
        self._local.copy_(_whole_at(step)[self._rows])
        self._norm.fill_(step)
        self._trainer.update(step=step, seen=[step, 64 * step])

    def is_at(self, step: int) -> bool:
        """Whether every leaf is what it is after ``step``."""
        return (
            torch.equal(self._local, _whole_at(step)[self._rows])
            and torch.equal(self._norm, torch.full((COLUMNS,), float(step)))
            and self._trainer == {"step": step, "seen": [step, 64 * step]}
        )


def _whole_at(step: int) -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) + 1000.0 * step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("url")
    parser.add_argument("--deadline-s", type=float, default=10.0, help="of saves and loads")
    parser.add_argument("--try-first", default="", help="URL of a run that cannot work here")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    note = Notes(args.directory)
    dist.init_process_group("gloo", timeout=timedelta(seconds=2 * args.deadline_s))
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    note("started", **place)

    def hold(event: events.Event) -> None:
        order = args.directory / f"hold-{socket.gethostname()}"
        if isinstance(event, events.StepReached) and order.exists():
            number = order.read_text()
            if number and int(number) == event.number:
                note("held", step=event.step, **place)
                while order.exists():
                    time.sleep(0.05)

    events.subscribe(hold)
    if args.try_first:
        try:
            train(args, args.try_first, note, place)
        except DcpResumeError as error:
            note("refused", **_facts(error), **place)
    try:
        train(args, args.url, note, place)
    except DcpResumeError as error:
        note("error", **_facts(error), **place)
        raise
    note("finished", **place)
    dist.destroy_process_group()


def _facts(error: DcpResumeError) -> dict[str, Any]:
    ranks = getattr(error, "ranks", None)
    return {"kind": type(error).__name__, "ranks": ranks, "text": str(error)}


def train(args: argparse.Namespace, url: str, note: Notes, place: dict[str, int]) -> None:
    settings = Settings(
        mode=SaveMode.BLOCKING,
        max_checkpoint_keep=3,
        deadline_s=args.deadline_s,
        retry=RetryPolicy(deadline_s=args.deadline_s),
    )
    state = State()
    with CheckpointManager(url, settings) as checkpoints:
        found = checkpoints.resume(state.leaves)
        step = found.step if found else 0
        note("resumed", step=step, is_exact=found is None or state.is_at(step), **place)
        while not _all_agree_to_finish(args.directory):
            step += 1
            state.become(step)
            note("saving", step=step, **place)
            checkpoints.save(step, state.leaves).result()
            note("saved", step=step, **place)


def _all_agree_to_finish(directory: Path) -> bool:
    """The collective of a training step; also what a real step would take."""
    time.sleep(0.1)
    asked = torch.tensor([float((directory / "finish").exists())])
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked)


if __name__ == "__main__":
    main(parse())
