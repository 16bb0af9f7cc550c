"""The copies of a save whose tensors lie on accelerators.

They run on a stream beside the trainer's. The host waits for none of them before the files are
written; what it queues next to change a tensor waits, on the device, until that tensor is copied:

* what nothing but an optimizer's step changes may be copied late: the stream of the thread that
  calls ``drain``, as an optimizer does before it steps, is held;
* for the rest the caller's stream is held at once.

Work that the trainer queues on further streams must follow its current stream, as it must anyway
to see the tensors that the save saw.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from dcp_resume.errors import StateError
from dcp_resume.session.copies import (
    AtOnce,
    Copies,
    LateCopies,
    StepMemory,
    StepTensor,
    changed_early,
)
from dcp_resume.session.copy_queues import Accelerators, CopyQueue, Devices, Mark

__all__ = ["DeviceCopies", "late_copies", "prompt_copies"]


@dataclass(frozen=True, slots=True)
class _Copy:
    target: torch.Tensor
    source: torch.Tensor
    """Kept until it is read: the device's allocator must not give its memory away before."""
    is_late: bool


class DeviceCopies:
    """Copies from devices on their own queues, and from host memory as ``host`` does.

    Args:
        host: Of the same save.
        memory: What may be copied late.
        devices: Where the tensors may lie.
    """

    def __init__(self, host: Copies, memory: StepMemory, devices: Devices) -> None:
        self._host = host
        self._memory = memory
        self._devices = devices
        self._queues: dict[torch.device, CopyQueue] = {}
        self._asked: list[_Copy] = []
        self._prompt_marks: list[Mark] = []
        self._late_marks: list[Mark] = []
        self._lock = threading.Lock()
        self._versions: list[tuple[StepTensor, int]] = []  # at the save; until known to have held
        self._failure: StateError | None = None

    def copy(self, place: torch.Tensor, source: torch.Tensor) -> None:
        """Ask for a copy; none is queued before ``close``."""
        if not self._devices.has(source):
            self._host.copy(place, source)
            return
        owner = self._memory.owner_of(source)
        if owner is not None:
            self._versions.append((owner, owner.tensor._version))
        target = place.view(source.dtype).view(source.shape)  # wide dtypes come first in a file
        self._asked.append(_Copy(target, source, owner is not None))

    def close(self) -> None:
        """Queue the copies, and hold the caller's streams until the prompt ones are made."""
        self._host.close()
        for device in dict.fromkeys(copy.source.device for copy in self._asked):
            self._queues[device] = self._devices.open_queue(device)
            self._queues[device].follow_caller()
        self._prompt_marks = self._queue_copies(is_late=False)
        for mark in self._prompt_marks:
            mark.hold_caller()
        self._late_marks = self._queue_copies(is_late=True)

    def _queue_copies(self, *, is_late: bool) -> list[Mark]:
        chosen = [copy for copy in self._asked if copy.is_late is is_late]
        for copy in chosen:
            self._queues[copy.source.device].copy(copy.target, copy.source)
        return [self._queues[d].mark() for d in dict.fromkeys(c.source.device for c in chosen)]

    @property
    def are_done(self) -> bool:
        """Whether what anybody queues may change every source."""
        if not self._host.are_done or not all(mark.is_reached for mark in self._late_marks):
            return False
        self._check_versions()  # before the caller makes changes that it now may
        return True

    def drain(self) -> None:
        """Hold the calling thread's current streams until every source is copied."""
        self._host.drain()
        self._check_versions()
        for mark in self._late_marks:
            if not mark.is_reached:  # by others held or not: each stream waits for itself
                mark.hold_caller()

    def finish(self) -> None:
        """Return when every place holds what its source held at ``copy``.

        Raises:
            StateError: A source was changed by something else than a step before it was copied.
        """
        self._host.finish()
        for mark in [*self._prompt_marks, *self._late_marks]:
            mark.wait()
        self._check_versions()
        self._asked = []
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Queue nothing more; return when no place is written any more."""
        self._host.abandon()
        for queue in self._queues.values():
            queue.mark().wait()
        self._asked = []

    def _check_versions(self) -> None:
        with self._lock:
            self._failure = self._failure or changed_early(self._versions)
            self._versions = []
            self._memory = StepMemory((), ())  # lets go of the trainer's tensors


def prompt_copies() -> Copies:
    """The copies of a save after whose call the trainer may queue any change."""
    return _beside_trainer(AtOnce(), StepMemory((), ()))


def late_copies(memory: StepMemory) -> Copies:
    """The copies of a save that leaves ``memory`` for later."""
    return _beside_trainer(LateCopies(memory), memory)


def _beside_trainer(host: Copies, memory: StepMemory) -> Copies:
    if not torch.accelerator.is_available():
        return host
    return DeviceCopies(host, memory, Accelerators())
