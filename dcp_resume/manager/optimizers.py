"""Optimizer state, keyed by the FQN of the parameter that it belongs to, never by index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from dcp_resume.errors import DuplicateFqn, Problem

__all__ = ["Optimizers", "merge_disjoint"]

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True, strict=False)


class Optimizers:
    """The optimizers of this rank, keyed by FQN."""

    def __init__(self, key: str, pairs: Sequence[tuple[Module, Optimizer]]) -> None:
        self._key, self.pairs = key, pairs

    def state_dict(self) -> Mapping[str, Any]:
        """For saving, and to load into."""
        merged: dict[str, Any] = {}
        for model, optimizer in self.pairs:
            state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
            merge_disjoint(merged, state, self._key)
        return merged

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading."""
        for model, optimizer in self.pairs:
            set_optimizer_state_dict(model, optimizer, dict(state_dict), options=_FLAT)

    def untouched(self) -> list[Optimizer]:
        """Optimizers that have made no state yet; asking for their state dict makes one."""
        return [optimizer for _, optimizer in self.pairs if not optimizer.state]


def steps_of(optimizer: Optimizer) -> list[torch.Tensor]:
    found = (state.get("step") for state in optimizer.state.values())
    return [step for step in found if isinstance(step, torch.Tensor)]


def merge_disjoint(merged: dict[str, Any], more: Mapping[str, Any], key: str) -> None:
    """Add ``more`` to ``merged``.

    Raises:
        DuplicateFqn: Two model parts use one name.
    """
    common = sorted(merged.keys() & more.keys())
    if common:
        problem = Problem(f"{key}.{common[0]}", "duplicate", "two model parts use the name")
        raise DuplicateFqn(
            f"{problem}; name layers by their global index on every pipeline stage",
            problems=(problem,),
        )
    merged.update(more)
