"""How much of its time a trainer trained, and what its saves took."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from dcp_resume.events import (
    Event,
    FileWritten,
    LoadFinished,
    SaveAdvanced,
    SaveFailed,
    StorageRetried,
    TrainerBlocked,
)
from dcp_resume.observe.intervals import advised_interval_s

__all__ = ["Costs", "Goodput"]

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one rank, since it was subscribed."""

    wall_s: float
    blocked_s: float = 0.0
    """In calls of ``save``."""
    waited_s: float = 0.0
    """Of these, for an earlier save to end."""
    load_s: float = 0.0
    num_saves: int = 0
    """Calls of ``save`` that returned."""
    num_committed: int = 0
    num_failed: int = 0
    num_retries: int = 0
    """Requests to the store that were tried again."""
    written_bytes: int = 0
    write_s: float = 0.0
    """In the store, over all files."""
    write_cpu_s: float = 0.0
    """CPU seconds that digests and the store took, over all files."""
    loaded_bytes: int = 0
    load_cpu_s: float = 0.0
    """CPU seconds of the process in loads."""
    committed_s: float = 0.0
    """From the call of ``save`` to the commit, over all saves that committed."""

    @property
    def goodput(self) -> float:
        """The fraction of the time in which the trainer was not held up by a save or a load."""
        return max(0.0, 1.0 - (self.blocked_s + self.load_s) / self.wall_s) if self.wall_s else 1.0

    @property
    def bytes_per_s(self) -> float:
        """Rate at which the store took this rank's bytes; 0 before any."""
        return self.written_bytes / self.write_s if self.write_s else 0.0

    @property
    def write_cpu_s_per_gib(self) -> float:
        """CPU seconds for each GiB that the store took; 0 before any."""
        return self.write_cpu_s * _GIB / self.written_bytes if self.written_bytes else 0.0

    @property
    def load_cpu_s_per_gib(self) -> float:
        """CPU seconds for each GiB that was loaded; 0 before any."""
        return self.load_cpu_s * _GIB / self.loaded_bytes if self.loaded_bytes else 0.0

    def advised_interval_s(self, mtbf_s: float) -> float:
        """Seconds between saves by what they cost so far; 0 before the first.

        Args:
            mtbf_s: Mean time between failures of the whole job.

        Raises:
            ConfigurationError: ``mtbf_s`` is not above 0.
        """
        if not self.num_saves:
            return 0.0
        # A save that waited for the one before it was one too many: that is no cost of saving.
        cost_s = (self.blocked_s - self.waited_s) / self.num_saves
        commit_s = self.committed_s / max(self.num_committed, 1)
        return advised_interval_s(cost_s, mtbf_s, commit_s)


class Goodput:
    """A subscriber that adds up; ``costs`` says what.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._lock = threading.Lock()
        self._sums: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Count the event."""
        with self._lock:
            for name, amount in _amounts(event).items():
                self._sums[name] = self._sums.get(name, 0) + amount

    @property
    def costs(self) -> Costs:
        """So far."""
        with self._lock:
            sums = dict(self._sums)
        counts = {name: int(n) for name, n in sums.items() if not name.endswith("_s")}
        seconds = {name: s for name, s in sums.items() if name.endswith("_s")}
        return Costs(wall_s=self._clock() - self._started, **counts, **seconds)  # type: ignore[arg-type]


def _amounts(event: Event) -> dict[str, float]:
    match event:
        case TrainerBlocked():
            blocked = {"blocked_s": event.duration_s, "waited_s": event.waited_s}
            return {"num_saves": 1, **blocked}
        case SaveAdvanced(milestone="committed"):
            return {"num_committed": 1, "committed_s": event.elapsed_s}
        case FileWritten():
            spent = {"write_s": event.duration_s, "write_cpu_s": event.cpu_s}
            return {"written_bytes": event.num_bytes, **spent}
        case LoadFinished():
            spent = {"load_s": event.duration_s, "load_cpu_s": event.cpu_s}
            return {"loaded_bytes": event.num_bytes, **spent}
        case SaveFailed():
            return {"num_failed": 1}
        case StorageRetried():
            return {"num_retries": 1}
    return {}
