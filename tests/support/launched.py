"""Start ``preempted_job.py`` under torchrun, signal it, and read what it noted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.preempted_job import notes_of

__all__ = ["Job", "Outcome", "is_alive"]

_SCRIPT = Path(__file__).with_name("preempted_job.py")
_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How one incarnation of the job went."""

    exit_code: int
    """Of the launcher; negative: the signal that killed it."""
    resumed: int
    """The step it went on from."""
    trained: int
    """The last step it trained."""
    left: list[tuple[int | None, str]]
    """Exit code and error of each rank; None if it was killed."""
    left_at: list[float]
    """When each rank that was not killed left, in Unix time."""
    output: str


class Job:
    """One incarnation: torchrun and its workers; use it as a context, which leaves nobody alive."""

    def __init__(
        self, root: Path | str, *flags: str, num_ranks: int = 2, torchrun: tuple[str, ...] = ()
    ) -> None:
        self._root = str(root)
        self._num_ranks = num_ranks
        self._seen = [len(self._all_notes(rank)) for rank in range(num_ranks)]
        self._log = Path(f"{root}.output")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks), *torchrun, str(_SCRIPT), self._root, *flags]
        environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def notes(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has noted in this incarnation so far."""
        return self._all_notes(rank)[self._seen[rank] :]

    def _all_notes(self, rank: int) -> list[dict[str, Any]]:
        path = notes_of(self._root, rank)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be on its way
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for_step(self, step: int) -> None:
        """Wait until every rank has trained it; raises if the job ends before."""
        while not all(self._last_step(rank) >= step for rank in range(self._num_ranks)):
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended: {self._log.read_text()}")
            time.sleep(0.02)

    def _last_step(self, rank: int) -> int:
        return max((note["step"] for note in self.notes(rank) if "step" in note), default=-1)

    def pids(self) -> list[int]:
        """Of the ranks."""
        return [
            next(note["pid"] for note in self.notes(rank) if "pid" in note)
            for rank in range(self._num_ranks)
        ]

    def stop_like_a_pod(self, grace_s: float) -> None:
        """SIGTERM to the main process, and SIGKILL to all when the grace period is over."""
        self.process.send_signal(signal.SIGTERM)
        if not self.has_ended(grace_s):
            self.kill()

    def has_ended(self, timeout_s: float) -> bool:
        """Whether the launcher ends in time."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """SIGKILL to the launcher and to every rank that is known."""
        self.process.kill()
        for rank in range(self._num_ranks):
            for note in self.notes(rank):
                if "pid" in note and is_alive(note["pid"]):
                    os.kill(note["pid"], signal.SIGKILL)

    def outcome(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the end."""
        exit_code = self.process.wait(timeout_s)
        killed = {"left": None, "error": "killed"}
        last = [
            next((note for note in reversed(self.notes(rank)) if "left" in note), killed)
            for rank in range(self._num_ranks)
        ]
        left = [(note["left"], note["error"]) for note in last]
        left_at = [note["time"] for note in last if note is not killed]
        resumed = next((note["resumed"] for note in self.notes(0) if "resumed" in note), -1)
        trained = max(self._last_step(rank) for rank in range(self._num_ranks))
        output = self._log.read_text(errors="replace")
        return Outcome(exit_code, resumed, trained, left, left_at, output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        self.process.wait()


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
