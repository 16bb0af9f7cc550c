"""Host memory for the bytes of a save or a load, pinned where a device copies to or from it.

A copy between a device and pinned memory runs beside the trainer's work, at the full rate of the
bus. One that is not pinned goes through a buffer of the driver's and holds the host meanwhile.

torch's own pinned memory comes in powers of two, which may take twice what a snapshot needs; so
CUDA memory is mapped here and registered with the driver at its own size.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from enum import Enum

import numpy as np
import torch

from dcp_resume.events import HostMemoryNotPinned, emit

__all__ = ["HostMemory", "allocate"]

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device of the process, not the current one alone."""


class HostMemory(Enum):
    """What a buffer is made of."""

    PAGEABLE = "pageable"
    PINNED = "pinned"


def allocate(num_bytes: int, memory: HostMemory) -> torch.Tensor:
    """A uint8 buffer of ``num_bytes`` with undefined contents.

    Where the driver refuses to pin memory (a limit of the container, say), the buffer is pageable
    and ``HostMemoryNotPinned`` is emitted: copies are right, and slower.
    """
    if memory is HostMemory.PAGEABLE or not torch.accelerator.is_available():
        return torch.empty(num_bytes, dtype=torch.uint8)
    if torch.cuda.is_available():
        return _registered(num_bytes)
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        emit(HostMemoryNotPinned(num_bytes=num_bytes, reason=str(error)))
        return torch.empty(num_bytes, dtype=torch.uint8)


def _registered(num_bytes: int) -> torch.Tensor:
    """Whole pages of their own: two registered ranges must not share one."""
    mapping = mmap.mmap(-1, max(num_bytes, 1))
    buffer = torch.from_numpy(np.frombuffer(mapping, np.uint8))[:num_bytes]
    driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = buffer.data_ptr()
    code = int(driver.cudaHostRegister(address, len(mapping), _PORTABLE))
    if code:
        reason = f"cudaHostRegister answers {code}"
        _forget_refusal()
        emit(HostMemoryNotPinned(num_bytes=num_bytes, reason=reason))
        return buffer
    # The mapping must outlive its registration, so the finalizer holds it. At the interpreter's
    # exit the driver may be gone already, and ends the registration itself.
    weakref.finalize(buffer, _unregister, address, mapping).atexit = False
    return buffer


def _forget_refusal() -> None:
    """The driver keeps a refusal as its last error, and torch raises that at the next kernel."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unregister(address: int, _mapping: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
