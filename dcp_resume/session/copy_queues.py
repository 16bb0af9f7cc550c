"""An accelerator's queue of copies, beside the queue that the trainer fills.

A device works off each of its streams in order, and two streams in any order. So a copy that must
see the trainer's tensors as they are now follows the trainer's stream, and whatever the trainer
queues to change them must follow the copy. Both are said to the device; the host waits for neither.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Accelerators", "CopyQueue", "Devices", "Mark"]


class Mark(Protocol):
    """A point in a queue: all copies before it."""

    @property
    def is_reached(self) -> bool:
        """Whether they are made."""

    def hold_caller(self) -> None:
        """Let what the calling thread queues on the device from now on run after them."""

    def wait(self) -> None:
        """Return when they are made."""


class CopyQueue(Protocol):
    """The copies to or from one device, in their order."""

    def follow_caller(self) -> None:
        """Let later copies run after all that the calling thread has queued on the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy; both tensors must live until a later mark is reached.

        Args:
            target: Of the source's shape and dtype.
            source: One of the two is on the device, the other in host memory.
        """

    def mark(self) -> Mark:
        """The point that the queue has grown to."""


class Devices(Protocol):
    """Where tensors are that lie outside of host memory."""

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies there."""

    def open_queue(self, device: torch.device) -> CopyQueue:
        """A new queue beside the trainer's."""


class Accelerators:
    """The devices of this process that torch can queue work on."""

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies on one."""
        return tensor.device.type != "cpu"

    def open_queue(self, device: torch.device) -> CopyQueue:
        """A stream of its own."""
        return _StreamQueue(device)


class _StreamQueue:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device=device)

    def follow_caller(self) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # A strided copy goes through a temporary of torch's, which a copy that is still on its way
        # might outlive on the host.
        is_plain = target.is_contiguous() and source.is_contiguous()
        with self._stream:
            target.copy_(source, non_blocking=is_plain)

    def mark(self) -> Mark:
        # ``blocking``: a thread that waits sleeps, instead of taking a core from the trainer.
        event = torch.Event(device=self._device, blocking=True)
        event.record(self._stream)
        return _EventMark(event, self._device)


class _EventMark:
    def __init__(self, event: torch.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    @property
    def is_reached(self) -> bool:
        return self._event.query()

    def hold_caller(self) -> None:
        self._event.wait(torch.accelerator.current_stream(self._device))

    def wait(self) -> None:
        self._event.synchronize()
