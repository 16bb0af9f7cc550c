"""Processes that report to a campaign by a pipe; a report that was sent outlives a SIGKILL.

They are forked from a server that has torch loaded, so that a start takes tenths of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Report", "Reports", "Speaker", "hear_once", "prepare_fork_server"]

Report = dict[str, Any]

_PRELOAD = [
    "torch",
    "torch.distributed.tensor",
    "torch._dynamo",  # the first DTensor imports it, for seconds that count as the job's own
    "s3fs",
    "dcp_resume.manager.checkpoint_manager",
]


def prepare_fork_server() -> None:
    """Set what the fork server and all processes inherit."""
    # Each TCPStore client asks DNS for the name of its peer; where nobody answers, that takes 5 s.
    os.environ["RES_OPTIONS"] = "attempts:0"
    os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)


class Reports:
    """The speaker's end: call it to report."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def __call__(self, what: str, **facts: Any) -> None:
        data = json.dumps({"what": what, "at_s": time.monotonic(), **facts}).encode()
        with self._lock:
            self._pipe.send_bytes(data)


class Speaker:
    """The campaign's end of one process: what it said so far.

    Args:
        target: Main function of the process, importable.
        args: Passed to it, and after them its end of the pipe, which carries orders too.
        endings: Reports after which it has nothing more to say.
    """

    def __init__(
        self, target: Callable[..., None], args: Sequence[Any], endings: Collection[str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self.reports: list[Report] = []
        self.is_settled = False
        self._endings = endings
        self.process = context.Process(target=target, args=(*args, theirs), daemon=True)
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
        self.is_settled = report["what"] in self._endings
        return report

    def all(self, what: str) -> list[Report]:
        """Its reports of one kind."""
        return [report for report in self.reports if report["what"] == what]

    def end(self) -> None:
        """Kill it, and hear what it had said."""
        while not self.is_settled and self.pipe.poll():
            self.hear()
        self.process.kill()
        self.process.join()
        self.pipe.close()


def hear_once(speakers: Sequence[Speaker], timeout_s: float) -> None:
    """Wait until any of them reports, and hear those that did."""
    by_pipe: dict[Any, Speaker] = {one.pipe: one for one in speakers if not one.is_settled}
    for pipe in wait(list(by_pipe), timeout_s):
        by_pipe[pipe].hear()
