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

__all__ = ["Job", "Notes", "Outcome", "is_alive", "worker_command"]

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
    codes: list[int]
    """Exit codes of the ranks that were not killed."""
    errors: list[str]
    """What ended them."""
    left_at: float
    """When the last of them left, in Unix time."""
    output: str


class Notes:
    """What the ranks of one incarnation have noted so far; notes from before it are left out."""

    def __init__(self, root: Path | str, num_ranks: int) -> None:
        self._root = str(root)
        self._num_ranks = num_ranks
        self._seen = [0] * num_ranks
        self._seen = [len(self.of(rank)) for rank in range(num_ranks)]

    def of(self, rank: int) -> list[dict[str, Any]]:
        """Of one rank, oldest first."""
        path = notes_of(self._root, rank)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be on its way
        return [json.loads(line) for line in whole.splitlines()[self._seen[rank] :]]

    def named(self, name: str) -> list[dict[str, Any]]:
        """The last note of each rank that has such a value; ranks without one are left out."""
        found = [
            next((note for note in reversed(self.of(rank)) if name in note), None)
            for rank in range(self._num_ranks)
        ]
        return [note for note in found if note is not None]

    def all_have(self, name: str, least: int = 0) -> bool:
        """Whether every rank has noted such a value, of at least so much."""
        found = self.named(name)
        return len(found) == self._num_ranks and all(note[name] >= least for note in found)

    @property
    def pids(self) -> list[int]:
        """Of the ranks."""
        return [note["pid"] for note in self.named("pid")]

    @property
    def trained(self) -> int:
        """The last step that any rank has trained; -1 if there is none."""
        return max((note["step"] for note in self.named("step")), default=-1)


def worker_command(root: Path | str, num_ranks: int, *flags: str) -> list[str]:
    """The command line of torchrun that starts the job; the signals that it passes on are three."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_ranks), "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    return [*command, str(_SCRIPT), str(root), *flags]


class Job:
    """One incarnation: torchrun and its workers; use it as a context, which leaves nobody alive."""

    def __init__(self, root: Path | str, *flags: str, num_ranks: int = 2) -> None:
        self.notes = Notes(root, num_ranks)
        self._log = Path(f"{root}.output")
        environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "200"  # s: whoever uses us sends the kill
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                worker_command(root, num_ranks, *flags),
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def wait_for_step(self, step: int) -> None:
        """Wait until every rank has trained it; raises if the job ends before."""
        while not self.notes.all_have("step", step):
            if self.process.poll() is not None:
                raise AssertionError(f"the job ended: {self._log.read_text()}")
            time.sleep(0.02)

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
        for pid in self.notes.pids:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)

    def outcome(self, timeout_s: float | None = None) -> Outcome:
        """Wait for the end."""
        exit_code = self.process.wait(timeout_s)
        left = self.notes.named("left")
        return Outcome(
            exit_code,
            resumed=max((note["resumed"] for note in self.notes.named("resumed")), default=-1),
            trained=self.notes.trained,
            codes=[note["left"] for note in left],
            errors=[note["error"] for note in left],
            left_at=max((note["time"] for note in left), default=time.time()),
            output=self._log.read_text(errors="replace"),
        )

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
