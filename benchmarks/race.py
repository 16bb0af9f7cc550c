"""One rank's part of a race: the state, the limits, and one library after the other.

Each library has the processes to itself, so that only its own copies and files take memory. The
limit is probed before every call, so that a machine that becomes slower becomes so for both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.cost import Cost, Counter, measure, transferred
from benchmarks.limits import RawLimits
from benchmarks.payload import Size, blank_state, make_state, memory_of

__all__ = ["Race"]


class Race:
    """State, a second state to load into, and the raw limits over both.

    Args:
        size: Of the payload.
        directory: On the storage to measure.
    """

    def __init__(self, size: Size, directory: Path) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        self.state = make_state(size, mesh, seed=1)
        self.target = blank_state(self.state)
        self.path = directory / "library"
        self._raw = RawLimits(
            list(memory_of(self.state)),
            list(memory_of(self.target)),
            directory / f"raw-{dist.get_rank()}",
        )

    def copy_limit(self) -> Cost:
        """Memcpy into warm buffers."""
        return measure(self._raw.copy)

    def write_limit(self) -> Cost:
        """Write and fsync."""
        return measure(self._raw.write)

    def read_limit(self) -> Cost:
        """Read into warm memory."""
        return measure(self._raw.read)

    def load(self, call: Callable[[], object], count: Counter = transferred) -> Cost:
        """The cost of a load into ``target``.

        Args:
            call: Loads.
            count: As a ``Meter`` counts.

        Raises:
            ValueError: It brought other values than the state's.
        """
        for tensor in memory_of(self.target):
            tensor.fill_(0)
        cost = measure(call, count)
        pairs = zip(memory_of(self.target), memory_of(self.state), strict=True)
        if not all(torch.equal(found, expected) for found, expected in pairs):
            raise ValueError("loaded other values than were saved")
        return cost

    def forget(self) -> None:
        """Give the space of what was saved back; what a library remembers in memory stays."""
        dist.barrier()
        if dist.get_rank() == 0:
            for old in list(self.path.glob("*/step-*")) or [self.path]:
                shutil.rmtree(old, ignore_errors=True)
        dist.barrier()

    def close(self) -> None:
        """Delete the limits' files."""
        self._raw.close()
