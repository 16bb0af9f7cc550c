"""What a call costs over all ranks: wall time, CPU time, memory, bytes read and written."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

__all__ = ["Cost", "Meter", "Reading", "measure", "over_ranks"]

Reading = tuple[float, float, int, int, int]
"""Wall and CPU seconds, peak, read and written bytes of one rank."""


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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Meter:
    """Measures on one rank from its making on."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self._resident = _status("VmRSS")
        dist.barrier()
        self._read, self._written = _transferred()
        self._cpu = time.process_time()
        self._wall = time.monotonic()

    def read(self) -> Reading:
        """What this rank has spent until now. No collective: a save may be running beside."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        read, written = _transferred()
        peak = max(0, _status("VmHWM") - self._resident)
        return wall, cpu, peak, read - self._read, written - self._written


def over_ranks(own: Reading) -> Cost:
    """The cost on all ranks. Collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    walls, cpus, peaks, reads, writes = zip(*every, strict=True)
    return Cost(max(walls), sum(cpus), sum(peaks), sum(reads), sum(writes))


def measure(call: Callable[[], object]) -> Cost:
    """Run a call on all ranks at once."""
    meter = Meter()
    call()
    return over_ranks(meter.read())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _transferred() -> tuple[int, int]:
    if not os.access("/proc/self/io", os.R_OK):
        return 0, 0
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])
