"""Where loaded bytes go: the trainer's own memory where it can be written in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch

from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box

__all__ = ["Apply", "Target", "settle", "target_of"]


class Apply(Enum):
    """When loaded bytes reach the trainer's tensors."""

    IN_PLACE = "in_place"
    """Block by block, each verified before it enters. No extra memory."""
    ATOMIC = "atomic"
    """Only after every block was verified; needs host memory for the rank's state once more."""


@dataclass(slots=True)
class Target:
    """One wanted box, and the memory it is read into."""

    fqn: str
    box: Box
    """In the coordinates of the stored tensor."""
    memory: memoryview
    """Row-major bytes of the box."""
    view: torch.Tensor | None
    """The trainer's memory, where ``memory`` is a copy of it that must be copied back."""
    copy: torch.Tensor | None


def target_of(fqn: str, box: Box, view: torch.Tensor, apply: Apply) -> Target:
    """The target of one wanted box.

    Args:
        fqn: Name of the stored tensor.
        box: In its coordinates.
        view: The trainer's memory of the box, of the same shape.
        apply: When the memory may change.
    """
    is_direct = (
        apply is Apply.IN_PLACE
        and view.device.type == "cpu"
        and view.is_contiguous()
        and not (view.is_conj() or view.is_neg())
    )
    if is_direct:
        return Target(fqn, box, as_bytes(view), None, None)
    copy = torch.empty(view.shape, dtype=view.dtype)
    return Target(fqn, box, as_bytes(copy), view, copy)


def settle(targets: Iterable[Target]) -> None:
    """Copy what was read beside the trainer's memory into it."""
    with torch.no_grad():
        for target in targets:
            if target.view is not None and target.copy is not None:
                target.view.copy_(target.copy)
