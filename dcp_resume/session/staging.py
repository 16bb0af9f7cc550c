"""Host memory that a snapshot is copied into: allocated once, reused by every save.

Copying into warm pages is 10 to 25 times faster than into fresh ones (measured on the
development machine: 16–18 GB/s against 0.6–1.5 GB/s), so buffers outlive their save.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.session.copies import Copies
from dcp_resume.session.host_memory import HostMemory, allocate

__all__ = ["BufferPool", "StagedFile", "borrow_chunks", "snapshot", "stage_chunks"]

_GRAIN = 1 << 20
"""Buffers are sized in MiB, so that a state that grows by a few bytes still finds one."""


@dataclass(slots=True)
class BufferPool:
    """Reusable host buffers of one process.

    A buffer returns when its last reader is done, not when a save is declared ended: a slow upload
    may still read it.
    """

    _free: dict[HostMemory, list[torch.Tensor]] = field(
        default_factory=lambda: {memory: [] for memory in HostMemory}
    )
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, num_bytes: int, memory: HostMemory) -> torch.Tensor:
        """A uint8 buffer of at least ``num_bytes``, with undefined contents."""
        wanted = max(1, -(-num_bytes // _GRAIN)) * _GRAIN
        with self._lock:
            free = self._free[memory]
            fitting = [b for b in free if wanted <= b.numel() <= 2 * wanted]
            if fitting:
                best = min(fitting, key=torch.Tensor.numel)
                self._free[memory] = [b for b in free if b is not best]
                return best
        return allocate(wanted, memory)

    def give_back(self, buffer: torch.Tensor, memory: HostMemory) -> None:
        """Return a buffer that no one reads any more."""
        with self._lock:
            self._free[memory].append(buffer)

    def clear(self) -> None:
        """Drop all free buffers."""
        with self._lock:
            for free in self._free.values():
                free.clear()


@dataclass(slots=True)
class StagedFile:
    """The chunks of one data file, in memory that nobody changes until ``release``."""

    buffers: list[memoryview]
    lengths: list[int]
    """Bytes of each chunk."""
    _pool: BufferPool | None = None
    _buffer: torch.Tensor | None = None
    _memory: HostMemory = HostMemory.PAGEABLE

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of each chunk."""
        if self._buffer is None:
            yield from self.buffers
            return
        (whole,) = self.buffers
        position = 0
        for length in self.lengths:
            yield whole[position : position + length]
            position += length

    def release(self) -> None:
        """Say that the bytes have been read for the last time."""
        self.buffers = []
        if self._pool is not None and self._buffer is not None:
            self._pool.give_back(self._buffer, self._memory)
        self._pool = self._buffer = None


def borrow_chunks(views: Sequence[torch.Tensor]) -> StagedFile:
    """Use the tensors' own memory, for a save that blocks until it is written.

    Only chunks that are not contiguous in CPU memory are copied.
    """
    buffers = [as_bytes(view) for view in views]
    return StagedFile(buffers, [len(buffer) for buffer in buffers])


def stage_chunks(views: Sequence[torch.Tensor], pool: BufferPool, copies: Copies) -> StagedFile:
    """Copy the chunks into one buffer, in file order.

    When ``copies`` are done the caller may change the tensors.
    """
    lengths = [view.nbytes for view in views]
    is_host = all(view.device.type == "cpu" for view in views)
    memory = HostMemory.PAGEABLE if is_host else HostMemory.PINNED
    buffer = pool.take(sum(lengths), memory)
    filled = buffer[: sum(lengths)]
    with torch.no_grad():
        for view, place in zip(views, filled.split_with_sizes(lengths), strict=True):
            source = view
            if source.is_conj() or source.is_neg():
                source = source.resolve_conj().resolve_neg()
            copies.copy(place, source)
    return StagedFile([as_bytes(filled)], lengths, pool, buffer, memory)


def snapshot(state: Any) -> Any:
    """A copy of a state dict that no later change of the original reaches.

    For planners that hold on to the state dict itself; it takes fresh memory, unlike
    ``stage_chunks``.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: snapshot(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(snapshot(value) for value in state)
    return copy.deepcopy(state)
