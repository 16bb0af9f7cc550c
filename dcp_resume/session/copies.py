"""When chunks are copied into host buffers: at once, or late, behind forward and backward.

Late is right for memory that nothing but an optimizer's step changes. Such copies are queued; the
thread that writes the save works them off, and whoever is about to change the memory calls
``drain`` first, which helps and returns when all is copied.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from dcp_resume.errors import Problem, StateError
from dcp_resume.problems import summarise

__all__ = ["AtOnce", "Copies", "LateCopies", "StepMemory", "StepTensor", "changed_early"]

_MIN_LATE_BYTES = 32 * 1024
"""Smaller copies cost less than to queue them."""
_Pair = tuple[torch.Tensor, torch.Tensor]
"""Place and source."""
_PIECE_BYTES = 8 << 20
"""Of a large copy, so that two threads share it and neither waits long for the other's."""


class Copies(Protocol):
    """The copies of one save."""

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` into ``place``, a flat uint8 buffer of its bytes, now or later."""

    def close(self) -> None:
        """No further copy is asked for: from now on the caller may do what the save allows."""

    @property
    def are_done(self) -> bool:
        """Whether the caller may change every source."""

    def drain(self) -> None:
        """Return when the caller may change every source."""

    def finish(self) -> None:
        """Return when every place holds what its source held at ``copy``.

        Raises:
            StateError: A source was changed before it was copied.
        """

    def abandon(self) -> None:
        """Copy nothing more; return when no place is written any more."""


class AtOnce:
    """Copies in the caller's thread."""

    @property
    def are_done(self) -> bool:
        """Always."""
        return True

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """Copy."""
        _fill(place, source)

    def close(self) -> None:
        """Nothing is left."""

    def drain(self) -> None:
        """Nothing is left."""

    def finish(self) -> None:
        """Nothing is left."""

    def abandon(self) -> None:
        """Nothing is left."""


def _fill(place: torch.Tensor, source: torch.Tensor) -> None:
    if source.is_cpu and source.is_contiguous():
        # By address: it makes no view, and does not hold the GIL.
        ctypes.memmove(place.data_ptr(), source.data_ptr(), source.nbytes)
        return
    # Places are aligned, because wide dtypes come first in a file.
    place.view(source.dtype).view(source.shape).copy_(source)


@dataclass(frozen=True, slots=True)
class StepTensor:
    """A tensor that nothing but an optimizer's step changes."""

    name: str
    tensor: torch.Tensor
    """Its version counts the changes; a DTensor counts for its local tensor."""
    memory: torch.Tensor
    """The local tensor."""


class StepMemory:
    """The memory that nothing but an optimizer's step changes.

    Args:
        tensors: Which have it.
        changing: Tensors that change otherwise; what shares memory with them is not in it.
    """

    def __init__(self, tensors: Iterable[StepTensor], changing: Iterable[torch.Tensor]) -> None:
        spans = sorted(_span(tensor) for tensor in changing)
        starts = [start for start, _ in spans]
        reach: list[int] = []  # the furthest end of the spans up to each
        for _, end in spans:
            reach.append(max(end, reach[-1]) if reach else end)
        found: list[tuple[int, int, StepTensor]] = []
        for owner in tensors:
            start, end = _span(owner.memory)
            before = bisect_right(starts, end - 1)
            if start < end and not (before and reach[before - 1] > start):
                found.append((start, end, owner))
        found.sort(key=lambda item: item[:2])
        self._starts = [start for start, _, _ in found]
        self._found = found

    def owner_of(self, view: torch.Tensor) -> StepTensor | None:
        """The tensor that the memory of ``view`` is a part of; None if there is none."""
        start, end = _span(view)
        number = bisect_right(self._starts, start) - 1
        if number < 0 or self._found[number][1] < end:
            return None
        owner = self._found[number][2]
        # Not every device has addresses that no other has.
        return owner if owner.memory.device == view.device else None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor's elements, and the one after the last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if not tensor.numel():
        return start, start
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    return start, start + (last + 1) * tensor.element_size()


class LateCopies:
    """Copies memory that only steps change later, and all other at once.

    Args:
        memory: What may be copied later.
    """

    def __init__(self, memory: StepMemory) -> None:
        self._memory = memory
        self._queue: deque[_Pair] = deque()
        self._all: list[tuple[StepTensor, int]] = []  # with its version at the save
        self._changed = threading.Condition()
        self._running: set[int] = set()
        """Threads that have claimed a copy; each has one at a time."""
        self._failure: BaseException | None = None
        self._are_done = False

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """Copy now, or queue the copy."""
        owner = None
        if source.device.type == "cpu" and source.nbytes >= _MIN_LATE_BYTES:
            owner = self._memory.owner_of(source)
        if owner is None:
            _fill(place, source)
            return
        version = owner.tensor._version
        self._all.append((owner, version))
        if source.nbytes <= _PIECE_BYTES or not source.is_contiguous():
            self._queue.append((place, source))
            return
        length = _PIECE_BYTES // source.element_size()
        pieces = torch.split(source.view(-1), length)
        pairs = zip(torch.split(place, length * source.element_size()), pieces, strict=True)
        self._queue.extend(pairs)

    def close(self) -> None:
        """The queue, if there is one, is worked off by whoever comes first."""
        if not self._all:
            self.drain()

    @property
    def are_done(self) -> bool:
        """Whether the caller may change every source."""
        return self._are_done

    def drain(self) -> None:
        """Copy what is left, beside other threads that do; return when nothing is left."""
        if self._are_done:
            return
        self._note_interrupted()
        while (pair := self._claim()) is not None:
            failure: BaseException | None = None
            try:
                _fill(*pair)
            except BaseException as error:
                # Told by finish: a save that fails must not stop the step that waits for it.
                failure = error
                if not isinstance(error, Exception):
                    raise  # an interrupt of the trainer
            finally:
                self._end(failure)
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._running)
            if not self._are_done:
                self._failure = self._failure or changed_early(self._all)
                self._all = []
                self._memory = StepMemory((), ())  # lets go of the trainer's tensors
                self._are_done = True

    def finish(self) -> None:
        """Return when every place holds what its source held at ``copy``.

        Raises:
            StateError: A tensor was changed by something else than a step before it was copied.
        """
        self.drain()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Copy nothing more; return when no place is written any more."""
        with self._changed:
            self._queue.clear()
            self._all = []
        self.drain()

    def _note_interrupted(self) -> None:
        """A copy that this thread claimed and never made: Ctrl-C came in between."""
        with self._changed:
            if threading.get_ident() in self._running:
                self._running.discard(threading.get_ident())
                self._failure = self._failure or StateError(
                    "the copy of the state was interrupted (Ctrl-C): this save does not commit",
                    problems=(),
                )
                self._changed.notify_all()

    def _claim(self) -> _Pair | None:
        with self._changed:
            if not self._queue:
                return None
            self._running.add(threading.get_ident())
            return self._queue.popleft()

    def _end(self, failure: BaseException | None) -> None:
        with self._changed:
            self._running.discard(threading.get_ident())
            self._failure = self._failure or failure
            self._changed.notify_all()


def changed_early(copied: Iterable[tuple[StepTensor, int]]) -> StateError | None:
    """Tell of tensors that are no longer of the version they had at the save; None if all are."""
    names = dict.fromkeys(o.name for o, version in copied if o.tensor._version != version)
    if not names:
        return None
    message = "changed in place, by no step of an optimizer, before it was copied"
    problems = tuple(Problem(name, "changed", message) for name in names)
    return StateError(
        f"cannot save {len(problems)} tensor(s):\n{summarise(problems)}\ncall wait_until_staged() "
        f"of the pending save before such a change, or save in SaveMode.BACKGROUND",
        problems=problems,
    )
