"""FQNs of parameters and buffers: the same whatever wraps the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

__all__ = ["named_parameters", "named_state"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What ``torch.compile``, FSDP and activation checkpointing call the module that they wrap."""
_MAY_BE_WRAPPED = re.compile(rf"(?:^|\.)(?:module|{'|'.join(sorted(_WRAPPERS))})\.")


def named_parameters(model: Module) -> Iterator[tuple[str, Parameter]]:
    """Walk the parameters, each once (a tied one under its first name), by names without wrappers.

    >>> import torch
    >>> [name for name, _ in named_parameters(torch.nn.Linear(2, 2, bias=False))]
    ['weight']
    """
    for name, parameter in model.named_parameters():
        yield _unwrapped(model, name), parameter


def named_state(model: Module) -> dict[str, Any]:
    """A model's ``state_dict``, in its own memory, by names without wrappers.

    As torch's ``get_model_state_dict`` of any model but one under the older FSDP, in a quarter of
    its time.

    >>> import torch
    >>> list(named_state(torch.nn.BatchNorm1d(2, affine=False)))
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    # To detach a DTensor takes as long as the rest; whose state_dict it is may not know the option.
    is_torchs = getattr(model.state_dict, "__func__", None) is Module.state_dict
    with torch.no_grad():
        state = model.state_dict(keep_vars=True) if is_torchs else model.state_dict()
    return {_unwrapped(model, name): value for name, value in state.items()}


def _unwrapped(model: Module, name: str) -> str:
    if not _MAY_BE_WRAPPED.search(name):
        return name
    kept: list[str] = []
    module: object = model
    for item in name.split("."):
        # A module of one's own may be called "module" too; DDP's is told by its type.
        is_ddp = isinstance(module, DistributedDataParallel) and item == "module"
        if not is_ddp and item not in _WRAPPERS:
            kept.append(item)
        module = getattr(module, item, None)  # extra state has a name, and is no attribute
    return ".".join(kept)
