"""A payload as a trainer holds it: parameters of a module, and the state of its optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.payload import State

__all__ = ["as_trainer"]


def as_trainer(state: State) -> dict[str, Any]:
    """The same tensors, in ``model`` and ``optim``."""
    model = nn.Module()
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for fqn, tensor in state["model"].items():
        *modules, name = fqn.split(".")
        owner = model
        for part in modules:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        parameter = nn.Parameter(tensor)
        owner.register_parameter(name, parameter)
        moments[parameter] = state["optim"]["state"][fqn]
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.state.update(moments)
    return {"model": model, "optim": optimizer}
