"""A state that tells who made it, and after which step: in every element, and in its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

__all__ = ["Label", "LabelledState", "labels_of"]

_ROWS, _COLUMNS = 64, 512
_NUM_NORMS = 64
_PLACE_BITS, _STEP_BITS = 20, 20


@dataclass(frozen=True, order=True)
class Label:
    """Who made a state, and after which step."""

    writer: int
    step: int

    @property
    def element(self) -> int:
        """What an element holds above its place in the tensor."""
        return self.writer << _STEP_BITS | self.step

    @staticmethod
    def of(element: int) -> Label:
        """The label in an element without its place."""
        return Label(element >> _STEP_BITS, element & (1 << _STEP_BITS) - 1)


class LabelledState:
    """A tensor sharded over the ranks of the default group, a replicated one, and values."""

    def __init__(self) -> None:
        is_alone = not dist.is_initialized()
        rank, world_size = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
        rows = _ROWS // world_size
        self._places = _places()[rank * rows : (rank + 1) * rows]
        self._local = torch.zeros(rows, _COLUMNS, dtype=torch.int64)
        self._norm = torch.zeros(_NUM_NORMS, dtype=torch.int64)
        self._trainer: dict[str, Any] = {"step": -1, "writer": -1}
        whole = self._local if is_alone else self._sharded()
        self.leaves = {"model": {"w": whole, "norm": self._norm}, "trainer": self._trainer}

    def _sharded(self) -> DTensor:
        mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
        shape, stride = torch.Size((_ROWS, _COLUMNS)), (_COLUMNS, 1)
        return DTensor.from_local(
            self._local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def become(self, label: Label) -> None:
        """Change every leaf in place to what it is at the label."""
        self._local.copy_((label.element << _PLACE_BITS) + self._places)
        self._norm.fill_(label.element)
        self._trainer.update(step=label.step, writer=label.writer)

    def label(self) -> Label | None:
        """What it was made by; None if not every leaf is of one label."""
        label = Label(self._trainer["writer"], self._trainer["step"])
        local = (label.element << _PLACE_BITS) + self._places
        is_whole = torch.equal(self._local, local) and bool((self._norm == label.element).all())
        return label if is_whole else None


def labels_of(
    tensors: Iterable[tuple[str, torch.Tensor]], values: Mapping[str, int]
) -> tuple[set[Label], bool]:
    """What stored pieces of a state, and its values, are labelled with.

    Returns:
        All labels found, and whether every element is there once.
    """
    found = {Label(values["trainer.writer"], values["trainer.step"])}
    places, num_norms = [torch.empty(0, dtype=torch.int64)], 0
    for name, tensor in tensors:
        elements = tensor.reshape(-1)
        if name.startswith("model.w"):
            places.append(elements & (1 << _PLACE_BITS) - 1)
            elements = elements >> _PLACE_BITS
        else:
            num_norms += elements.numel()
        found |= {Label.of(element) for element in elements.unique().tolist()}
    is_complete = torch.equal(torch.cat(places).sort().values, _places().reshape(-1))
    return found, is_complete and num_norms == _NUM_NORMS


def _places() -> torch.Tensor:
    return torch.arange(_ROWS * _COLUMNS, dtype=torch.int64).reshape(_ROWS, _COLUMNS)
