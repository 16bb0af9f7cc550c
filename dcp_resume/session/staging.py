"""Host memory that a snapshot is copied into: allocated once, reused by every save.

Copying into warm pages is 10 to 25 times faster than into fresh ones (measured on the
development machine: 16–18 GB/s against 0.6–1.5 GB/s), so buffers outlive their save.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.session.copies import Copies
from dcp_resume.session.host_memory import HostMemory, allocate

__all__ = ["Borrowed", "BufferPool", "Buffered", "StagedFile", "Staging", "snapshot"]

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


class Staging(Protocol):
    """Where the bytes of a save are while its files are written."""

    @property
    def is_trainer_free(self) -> bool:
        """Whether the trainer may go on once the copies are made, before the files are written."""

    def stage(self, views: Sequence[torch.Tensor], copies: Copies) -> StagedFile:
        """The chunks of one file, in file order; complete when ``copies`` are finished."""


@dataclass(frozen=True, slots=True)
class Buffered:
    """In buffers of a pool, so that the trainer goes on while they are written."""

    pool: BufferPool

    @property
    def is_trainer_free(self) -> bool:
        """Yes."""
        return True

    def stage(self, views: Sequence[torch.Tensor], copies: Copies) -> StagedFile:
        """Copy all chunks of a file into one buffer."""
        lengths = [view.nbytes for view in views]
        memory = HostMemory.PAGEABLE if _are_on_host(views) else HostMemory.PINNED
        buffer = self.pool.take(sum(lengths), memory)
        filled = buffer[: sum(lengths)]
        with torch.no_grad():
            for view, place in zip(views, filled.split_with_sizes(lengths), strict=True):
                source = view
                if source.is_conj() or source.is_neg():
                    source = source.resolve_conj().resolve_neg()
                copies.copy(place, source)
        return StagedFile([as_bytes(filled)], lengths, self.pool, buffer, memory)


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Where the trainer has them, for a save that it waits for.

    Only chunks that are not contiguous are copied, and files with chunks of a device: these into
    buffers of the pool.
    """

    pool: BufferPool

    @property
    def is_trainer_free(self) -> bool:
        """No: it would change what is being written."""
        return False

    def stage(self, views: Sequence[torch.Tensor], copies: Copies) -> StagedFile:
        """Use the tensors' own memory."""
        if not _are_on_host(views):
            return Buffered(self.pool).stage(views, copies)
        buffers = [as_bytes(view) for view in views]
        return StagedFile(buffers, [len(buffer) for buffer in buffers])


def _are_on_host(views: Sequence[torch.Tensor]) -> bool:
    return all(view.device.type == "cpu" for view in views)


def snapshot(state: Any) -> Any:
    """A copy of a state dict that no later change of the original reaches.

    For planners that hold on to the state dict itself; it takes fresh memory, unlike ``Buffered``.
    """
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: snapshot(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(snapshot(value) for value in state)
    return copy.deepcopy(state)
