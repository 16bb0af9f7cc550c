"""Loads into the memory of accelerators, through two windows of pinned host memory.

One window is filled and proved while the other's bytes are on their way to the device. So a load
needs the same host memory whatever the size of the state, and no byte reaches the device before its
block was proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dcp_resume.session.copy_queues import Accelerators, CopyQueue, Mark
from dcp_resume.session.host_memory import HostMemory, allocate
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.reading import ReadOutcome, read_targets
from dcp_resume.session.targets import DeviceTarget, Target
from dcp_resume.session.windows import StoredBox, Window, cut_windows
from dcp_resume.storage import ObjectStore

__all__ = ["WINDOW_BYTES", "fill"]

WINDOW_BYTES = 64 << 20
"""Each of the two. A block that lies across the edge of a window is read once more."""


def fill(
    store: ObjectStore, opened: OpenedCheckpoint, targets: Sequence[Target | DeviceTarget]
) -> ReadOutcome:
    """Fill the targets, wherever they lie. Faults are returned, as by ``read_targets``."""
    on_host = [target for target in targets if isinstance(target, Target)]
    outcome = read_targets(store, opened, on_host)
    # Wide dtypes first, so that no piece of a window lies at an address that is odd for its dtype.
    on_devices = sorted(
        (target for target in targets if isinstance(target, DeviceTarget) and target.num_bytes),
        key=lambda target: -target.piece.memory.element_size(),
    )
    if on_devices and not outcome.problems:
        _fill_devices(store, opened, on_devices, outcome)
    return outcome


def _fill_devices(
    store: ObjectStore,
    opened: OpenedCheckpoint,
    targets: Sequence[DeviceTarget],
    outcome: ReadOutcome,
) -> None:
    queues = {d: Accelerators().open_queue(d) for d in {t.piece.memory.device for t in targets}}
    for queue in queues.values():
        queue.follow_caller()
    num_bytes = min(WINDOW_BYTES, sum(target.num_bytes for target in targets))
    buffers = [_Buffer.allocated(num_bytes) for _ in range(2)]
    try:
        for number, window in enumerate(_windows(targets, buffers)):
            found = read_targets(store, opened, window.targets)
            outcome.add(found)
            if found.problems:
                return
            buffers[number % 2].send(window, targets, queues)
    finally:
        for buffer in buffers:
            buffer.wait()


@dataclass(slots=True)
class _Buffer:
    """Pinned memory, and when it may be filled again."""

    bytes: torch.Tensor
    marks: list[Mark] = field(default_factory=list)

    @classmethod
    def allocated(cls, num_bytes: int) -> _Buffer:
        return cls(allocate(num_bytes, HostMemory.PINNED))

    def wait(self) -> None:
        for mark in self.marks:
            mark.wait()
        self.marks = []

    def send(
        self,
        window: Window,
        targets: Sequence[DeviceTarget],
        queues: dict[torch.device, CopyQueue],
    ) -> None:
        """Queue the copies of all that the window was filled with."""
        start = 0
        with torch.no_grad():
            for filled, number in zip(window.targets, window.numbers, strict=True):
                view = targets[number].piece.view(filled.box)
                source = self.bytes[start : start + view.nbytes]
                queues[view.device].copy(view, source.view(view.dtype).view(view.shape))
                start += view.nbytes
        self.marks = [queue.mark() for queue in queues.values()]


def _windows(targets: Sequence[DeviceTarget], buffers: Sequence[_Buffer]) -> Iterator[Window]:
    """The targets' pieces, window by window, in both buffers in turn."""
    wanted = [
        StoredBox(target.fqn, target.piece.box, target.piece.memory.element_size())
        for target in targets
    ]
    memories = [buffer.bytes.numpy().data for buffer in buffers]
    for number, window in enumerate(cut_windows(wanted, memories[0])):
        buffers[number % 2].wait()
        yield window.moved_to(memories[number % 2])
