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

__all__ = ["BufferPool", "StagedFile", "borrow_chunks", "snapshot", "stage_chunks"]

_GRAIN = 1 << 20
"""Buffers are sized in MiB, so that a state that grows by a few bytes still finds one."""


@dataclass(slots=True)
class BufferPool:
    """Reusable host buffers of one process.

    A buffer returns when its last reader is done, not when a save is declared ended: a slow upload
    may still read it.
    """

    _free: list[torch.Tensor] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, num_bytes: int) -> torch.Tensor:
        """A uint8 buffer of at least ``num_bytes``, with undefined contents."""
        wanted = max(1, -(-num_bytes // _GRAIN)) * _GRAIN
        with self._lock:
            fitting = [b for b in self._free if wanted <= b.numel() <= 2 * wanted]
            if fitting:
                best = min(fitting, key=torch.Tensor.numel)
                self._free = [b for b in self._free if b is not best]
                return best
        return torch.empty(wanted, dtype=torch.uint8)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return a buffer that no one reads any more."""
        with self._lock:
            self._free.append(buffer)

    def clear(self) -> None:
        """Drop all free buffers."""
        with self._lock:
            self._free.clear()


@dataclass(slots=True)
class StagedFile:
    """The chunks of one data file, in memory that nobody changes until ``release``."""

    buffers: list[memoryview]
    lengths: list[int]
    """Bytes of each chunk."""
    _pool: BufferPool | None = None
    _buffer: torch.Tensor | None = None

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
            self._pool.give_back(self._buffer)
        self._pool = self._buffer = None


def borrow_chunks(views: Sequence[torch.Tensor]) -> StagedFile:
    """Use the tensors' own memory, for a save that blocks until it is written.

    Only chunks that are not contiguous in CPU memory are copied.
    """
    buffers = [as_bytes(view) for view in views]
    return StagedFile(buffers, [len(buffer) for buffer in buffers])


def stage_chunks(views: Sequence[torch.Tensor], pool: BufferPool) -> StagedFile:
    """Copy the chunks into one buffer, in file order.

    After the call the caller may change the tensors.
    """
    lengths = [view.nbytes for view in views]
    buffer = pool.take(sum(lengths))
    filled = buffer[: sum(lengths)]
    with torch.no_grad():
        for view, place in zip(views, filled.split_with_sizes(lengths), strict=True):
            source = view
            if source.is_conj() or source.is_neg():
                source = source.resolve_conj().resolve_neg()
            _typed(place, source).copy_(source)
    return StagedFile([as_bytes(filled)], lengths, pool, buffer)


def _typed(place: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The bytes of ``place`` as a tensor of the source's dtype and shape.

    Places are aligned, because wide dtypes come first in a file.
    """
    return place.view(source.dtype).view(source.shape)


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
