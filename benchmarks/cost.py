"""What a call costs over all ranks: wall time, CPU time, memory, bytes read and written."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

__all__ = [
    "Cost",
    "Counter",
    "Meter",
    "Reading",
    "by_rank",
    "measure",
    "over_network",
    "over_ranks",
    "transferred",
]

Counter = Callable[[], tuple[int, int]]
"""Tells bytes read and bytes written until now."""


class Reading(NamedTuple):
    """What one rank has spent."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    read_bytes: int
    written_bytes: int

    def without(self, start: Reading, stop: Reading) -> Reading:
        """Less what was spent between two earlier readings; the peak counts all the same."""
        return Reading(
            self.seconds - (stop.seconds - start.seconds),
            self.cpu_seconds - (stop.cpu_seconds - start.cpu_seconds),
            self.peak_bytes,
            self.read_bytes - (stop.read_bytes - start.read_bytes),
            self.written_bytes - (stop.written_bytes - start.written_bytes),
        )


@dataclass(frozen=True)
class Cost:
    """Of one call on all ranks."""

    seconds: float
    """From the common start until the last rank is done."""
    cpu_seconds: float
    """Of all threads of all ranks."""
    peak_bytes: int
    """Resident memory over that at the start; the ranks' peaks added up."""
    read_bytes: int
    """Asked of the file system, by all ranks."""
    written_bytes: int
    rank_peak_bytes: int = 0
    """The peak of the rank that has the largest."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def transferred() -> tuple[int, int]:
    """What this process asked of the file system."""
    if not os.access("/proc/self/io", os.R_OK):
        return 0, 0
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def over_network() -> tuple[int, int]:
    """What went into and out of this machine's network devices, loopback among them."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    fields = [line.partition(":")[2].split() for line in lines]
    return sum(int(field[0]) for field in fields), sum(int(field[8]) for field in fields)


class Meter:
    """Measures on one rank from its making on.

    Args:
        count: Of the bytes.
    """

    def __init__(self, count: Counter = transferred) -> None:
        self._count = count
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._resident = _status("VmRSS")
        dist.barrier()
        self._read, self._written = self._count()
        self._cpu = time.process_time()
        self._wall = time.monotonic()

    def read(self) -> Reading:
        """What this rank has spent until now. No collective: a save may be running beside."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        read, written = self._count()
        peak = max(0, _status("VmHWM") - self._resident)
        return Reading(wall, cpu, peak, read - self._read, written - self._written)


def over_ranks(own: Reading) -> Cost:
    """The cost on all ranks. Collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    walls, cpus, peaks, reads, writes = zip(*every, strict=True)
    return Cost(max(walls), sum(cpus), sum(peaks), sum(reads), sum(writes), max(peaks))


def by_rank(own: float) -> list[float]:
    """One number of each rank. Collective."""
    every: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def measure(call: Callable[[], object], count: Counter = transferred) -> Cost:
    """Run a call on all ranks at once."""
    meter = Meter(count)
    call()
    return over_ranks(meter.read())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
