"""What the machine can do with a rank's bytes: copy them, write them durably, read them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

__all__ = ["RawLimits"]


class RawLimits:
    """Raw operations over the bytes of some tensors; each is timed by the caller.

    Args:
        tensors: Contiguous, in CPU memory.
        copies: Of the same shapes, to overwrite; their pages are in memory.
        path: Where this rank may keep one file.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor], path: Path
    ) -> None:
        self._tensors = list(tensors)
        self._copies = list(copies)
        self._path = path
        self.write()

    def copy(self) -> None:
        """Memcpy into buffers that are kept: the limit of a snapshot."""
        for copy, tensor in zip(self._copies, self._tensors, strict=True):
            copy.copy_(tensor)

    def write(self) -> None:
        """Write and fsync: the limit of a save."""
        with self._path.open("wb", buffering=0) as file:
            for tensor in self._tensors:
                _write_all(file.fileno(), _bytes(tensor))
            os.fsync(file.fileno())

    def read(self) -> None:
        """Read into memory that is kept: the limit of a load."""
        with self._path.open("rb", buffering=0) as file:
            for copy in self._copies:
                view = _bytes(copy)
                while view:
                    view = view[file.readinto(view) :]

    def close(self) -> None:
        """Delete the file."""
        self._path.unlink()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _write_all(file: int, view: memoryview) -> None:
    while view:
        view = view[os.write(file, view) :]
