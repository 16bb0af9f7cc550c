"""A pool of gloo ranks for the whole test run: forked once, handed functions by pipe.

    with RankPool() as pool:
        pool.run(function, 4, "an argument")  # -> four results, by rank

Every call gets a process group of its own, over a store of its own, which is destroyed afterwards.
A rank that dies is replaced by the next call; one that hangs writes the stacks of its threads and
exits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Died", "Failed", "RankPool", "RanksFailed", "Returned", "rank_pool"]

_PRELOAD = [
    "pytest",
    "torch",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "s3fs",
    "dcp_resume.manager.checkpoint_manager",
]
_LATE_S = 30.0
"""How much longer than a rank's own watchdog the pool waits before it kills the rank."""


@dataclass(frozen=True)
class Returned:
    """What a rank's function returned."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """What a rank's function raised."""

    error: BaseException
    trace: str

    def __str__(self) -> str:
        return self.trace


@dataclass(frozen=True)
class Died:
    """The rank's process ended."""

    exit_code: int | None
    """Negative: the signal."""
    stacks: str
    """Of all its threads, if it hung."""

    def __str__(self) -> str:
        return f"died with exit code {self.exit_code}\n{self.stacks}"


Outcome = Returned | Failed | Died


class RanksFailed(AssertionError):
    """Some ranks did not return."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        wrong = {r: o for r, o in enumerate(outcomes) if not isinstance(o, Returned)}
        text = "\n".join(f"--- rank {rank}: {outcome}" for rank, outcome in wrong.items())
        super().__init__(f"rank(s) {sorted(wrong)} of {len(outcomes)} failed\n{text}")


@dataclass(frozen=True)
class _Task:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    world_size: int
    store_port: int
    """Where the store listens; 0 for the rank that is to host it."""
    timeout_s: float


class _Worker:
    """One process that carries out tasks until its pipe closes."""

    def __init__(self, directory: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.pipe, theirs = context.Pipe()
        # The log's name is taken before the process has a number.
        handle, name = tempfile.mkstemp(dir=directory)
        os.close(handle)
        self._log = Path(name)
        self.process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self) -> Outcome:
        """What it sent, or how it ended; call it once its pipe is readable."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Died(self.process.exitcode, self._log.read_text(errors="replace"))

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class RankPool:
    """Ranks that outlive the tests; use it as a context."""

    def __init__(self) -> None:
        # Each TCPStore client asks DNS for the name of ::ffff:127.0.0.1, which is in no hosts file;
        # where nobody answers, that takes 5 s. No tries, no wait; the ranks inherit it.
        os.environ["RES_OPTIONS"] = "attempts:0"
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # no C++ stacks of every lost connection
        self._workers: list[_Worker] = []
        self._directory = Path(tempfile.mkdtemp(prefix="ranks-"))

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
    ) -> list[Any]:
        """Run a module-level function on every rank of a fresh process group.

        Returns:
            The results by rank.

        Raises:
            RanksFailed: Ranks raised, died or hung; the message has their traces.
        """
        outcomes = self.outcomes(function, world_size, *args, timeout_s=timeout_s)
        if not all(isinstance(outcome, Returned) for outcome in outcomes):
            raise RanksFailed(outcomes)
        return [outcome.value for outcome in outcomes if isinstance(outcome, Returned)]

    def outcomes(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        is_store_at_rank_0: bool = False,
    ) -> list[Outcome]:
        """As ``run``, for functions that are meant to fail or to die.

        Args:
            function: Must be importable by the ranks.
            world_size: Ranks that take part.
            args: Passed to the function.
            timeout_s: After which a rank that has not returned shows its stacks and exits.
            is_store_at_rank_0: The group's store dies with rank 0, as without torchrun's agent;
                otherwise it lives in this process.
        """
        self._grow(world_size)
        workers = self._workers[:world_size]
        with contextlib.ExitStack() as stack:
            tasks = [
                _Task(function, args, rank, world_size, 0, timeout_s) for rank in range(world_size)
            ]
            first = 0
            if is_store_at_rank_0:
                workers[0].pipe.send(tasks[0])
                port, first = workers[0].pipe.recv(), 1
            else:
                store = _host_store(timeout_s)
                stack.callback(lambda: store)  # kept until the ranks are done
                port = store.port
            for worker, task in list(zip(workers, tasks, strict=True))[first:]:
                worker.pipe.send(_Task(**{**vars(task), "store_port": port}))
            return self._collect(workers, timeout_s)

    def _grow(self, world_size: int) -> None:
        # A process keeps its rank for life: DTensor caches what it worked out for the rank's
        # place on a mesh, and a process that changed its rank would copy another rank's rows.
        self._workers = [
            worker if worker.process.is_alive() else _Worker(self._directory)
            for worker in self._workers
        ]
        while len(self._workers) < world_size:
            self._workers.append(_Worker(self._directory))

    def _collect(self, workers: list[_Worker], timeout_s: float) -> list[Outcome]:
        found: dict[Connection, Outcome] = {}
        by_pipe = {worker.pipe: worker for worker in workers}
        while len(found) < len(workers):
            ready = wait([pipe for pipe in by_pipe if pipe not in found], timeout_s + _LATE_S)
            if not ready:  # not even the watchdog thread could run
                for pipe in by_pipe.keys() - found.keys():
                    by_pipe[pipe].process.kill()
            for pipe in ready:
                found[pipe] = by_pipe[pipe].outcome()
        for pipe, outcome in found.items():
            if isinstance(outcome, Died):
                by_pipe[pipe].kill()
        return [found[worker.pipe] for worker in workers]

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


def rank_pool() -> Iterator[RankPool]:
    """Body of the session fixture ``ranks``."""
    with RankPool() as pool:
        yield pool


def _host_store(timeout_s: float) -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
    )


def _serve(pipe: Connection, log_path: str) -> None:
    """Main function of a rank's process."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    with open(log_path, "w") as log, contextlib.suppress(EOFError):
        while True:
            task = pipe.recv()
            faulthandler.dump_traceback_later(task.timeout_s, exit=True, file=log)
            outcome = _carry_out(task, pipe)
            faulthandler.cancel_dump_traceback_later()
            pipe.send_bytes(_pickled(outcome))


def _carry_out(task: _Task, pipe: Connection) -> Outcome:
    try:
        if task.store_port:
            timeout = timedelta(seconds=task.timeout_s)
            store = dist.TCPStore("127.0.0.1", task.store_port, is_master=False, timeout=timeout)
        else:
            store = _host_store(task.timeout_s)
            pipe.send(store.port)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=task.rank,
            world_size=task.world_size,
            timeout=timedelta(seconds=task.timeout_s),
        )
        try:
            return Returned(task.function(*task.args))
        finally:
            dist.destroy_process_group()
    except BaseException as error:
        return Failed(error, traceback.format_exc())


def _pickled(outcome: Outcome) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception as error:
        trace = outcome.trace if isinstance(outcome, Failed) else repr(outcome)
        return pickle.dumps(Failed(TypeError(f"cannot be pickled: {error}"), trace))
