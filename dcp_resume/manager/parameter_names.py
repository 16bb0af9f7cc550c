"""FQNs of parameters: the same whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

__all__ = ["named_parameters"]

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What ``torch.compile``, FSDP and activation checkpointing call the module that they wrap."""


def named_parameters(model: Module) -> Iterator[tuple[str, Parameter]]:
    """Walk the parameters, each once (a tied one under its first name), by names without wrappers.

    >>> import torch
    >>> [name for name, _ in named_parameters(torch.nn.Linear(2, 2, bias=False))]
    ['weight']
    """
    for name, parameter in model.named_parameters():
        yield _unwrapped(model, name), parameter


def _unwrapped(model: Module, name: str) -> str:
    kept: list[str] = []
    module: object = model
    for item in name.split("."):
        # A module of one's own may be called "module" too; DDP's is told by its type.
        is_ddp = isinstance(module, DistributedDataParallel) and item == "module"
        if not is_ddp and item not in _WRAPPERS:
            kept.append(item)
        module = getattr(module, item)
    return ".".join(kept)
