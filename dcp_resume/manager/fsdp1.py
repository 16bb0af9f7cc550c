"""Optimizers of models under the older ``FullyShardedDataParallel``, through torch's own helpers.

It keeps parameters as slices of flat buffers; only torch knows which slice is which, and answers
with DTensors if the wrapper was given a device mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Module
from torch.optim import Optimizer

from dcp_resume.manager.optimizers import StoredPart, merge_disjoint
from dcp_resume.planning.parameters import EXECUTION

__all__ = ["Fsdp1Optimizers", "is_fsdp1"]

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)


def is_fsdp1(model: Module) -> bool:
    """Whether a model has parts under the older FSDP."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _is_execution(name: str) -> bool:
    return name.startswith("param_groups.") and name.rpartition(".")[2] in EXECUTION


class Fsdp1Optimizers:
    """The optimizers of this rank, as one Stateful."""

    def __init__(self, key: str, pairs: Sequence[tuple[Module, Optimizer]]) -> None:
        self._key, self._pairs = key, pairs
        self._fresh: list[Optimizer] = []
        self._execution: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """What the optimizers hold; torch lets one that holds nothing take an empty step."""
        self._fresh = [optimizer for _, optimizer in self._pairs if not optimizer.state]
        merged: dict[str, Any] = {}
        for model, optimizer in self._pairs:
            state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
            merge_disjoint(merged, state, self._key)
        with torch.no_grad():
            for step in self._steps():
                step.zero_()
        self._execution = {name: merged.pop(name) for name in list(merged) if _is_execution(name)}
        return merged

    def targets(self, stored: StoredPart) -> dict[str, Any]:
        """A state dict to load into."""
        return self.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading."""
        whole = {**state_dict, **self._execution}  # torch asks for every option
        for model, optimizer in self._pairs:
            set_optimizer_state_dict(model, optimizer, whole, options=_FLAT)
        if self._steps() and not any(self._steps()):  # saved before its first step
            self.undo()

    def undo(self) -> None:
        """Forget the state that ``state_dict`` made, after a save or a failed load."""
        for optimizer in self._fresh:
            optimizer.state.clear()
        self._fresh = []

    def _steps(self) -> list[torch.Tensor]:
        """Step counts of the optimizers that held nothing."""
        found = [s.get("step") for o in self._fresh for s in o.state.values()]
        return [step for step in found if isinstance(step, torch.Tensor)]
