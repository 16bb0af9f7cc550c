"""Where loaded bytes go: the trainer's own memory where it can be written in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch

from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.held import HeldPiece
from dcp_resume.planning.padding import inside_of, outside_of

__all__ = ["Apply", "DeviceTarget", "Target", "settle", "target_of", "targets_of"]


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
    """The trainer's memory, where it is to be set from ``copy`` once all is read."""
    copy: torch.Tensor | None
    """What ``memory`` is the bytes of, or zeros of which nothing is stored."""


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """One wanted box, and the memory of an accelerator that it is sent to."""

    fqn: str
    piece: HeldPiece
    """In the coordinates of the stored tensor."""

    @property
    def num_bytes(self) -> int:
        """Of the box."""
        return self.piece.memory.nbytes


def target_of(fqn: str, box: Box, view: torch.Tensor, apply: Apply) -> Target | DeviceTarget:
    """The target of one wanted box.

    Args:
        fqn: Name of the stored tensor.
        box: In its coordinates.
        view: The trainer's memory of the box, of the same shape.
        apply: When the memory may change.
    """
    if apply is Apply.IN_PLACE and view.device.type != "cpu":
        return DeviceTarget(fqn, HeldPiece(box, view))
    is_direct = (
        apply is Apply.IN_PLACE and view.is_contiguous() and not (view.is_conj() or view.is_neg())
    )
    if is_direct:
        # uint8 first: numpy has no bfloat16, no fp8 and no complex32.
        memory = view.detach().reshape(-1).view(torch.uint8).numpy().data
        return Target(fqn, box, memory, None, None)
    copy = torch.empty(view.shape, dtype=view.dtype)
    return Target(fqn, box, as_bytes(copy), view, copy)


def targets_of(
    fqn: str, piece: HeldPiece, stored_shape: tuple[int, ...], apply: Apply
) -> Iterator[Target | DeviceTarget]:
    """The targets of one held box: what is stored of it, and rows of padding that are not.

    Args:
        fqn: Name of the stored tensor.
        piece: The trainer's.
        stored_shape: Global shape of the stored tensor; smaller only in its padding.
        apply: When the memory may change.
    """
    stored = inside_of(piece.box, stored_shape)
    if stored is not None:
        yield target_of(fqn, stored, piece.view(stored), apply)
    if stored != piece.box:
        for box in outside_of(piece.box, stored_shape):
            yield _padding_target(fqn, piece.view(box))


def _padding_target(fqn: str, view: torch.Tensor) -> Target:
    """A target of no stored bytes, which becomes zeros once all is read."""
    nothing = Box((0,) * view.ndim, (0,) * view.ndim)
    zeros = torch.zeros((), dtype=view.dtype, device=view.device).expand(view.shape)
    return Target(fqn, nothing, memoryview(b""), view, zeros)


def settle(targets: Iterable[Target | DeviceTarget]) -> None:
    """Copy what was read beside the trainer's memory into it."""
    with torch.no_grad():
        for target in targets:
            if isinstance(target, Target) and target.view is not None and target.copy is not None:
                target.view.copy_(target.copy)
