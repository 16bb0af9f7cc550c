"""Which of a trainer's tensors nothing but an optimizer's step changes, and notice of each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dcp_resume.manager.fsdp1 import is_fsdp1
from dcp_resume.session.copies import AtOnce, Copies, StepMemory, StepTensor
from dcp_resume.session.device_copies import late_copies

__all__ = ["StepGuard", "Stepped", "step_memory"]


@runtime_checkable
class Stepped(Protocol):
    """A Stateful that says of which modules and optimizers its state is."""

    @property
    def step_objects(self) -> Sequence[Module | Optimizer]:
        """Those whose memory the tensors of its ``state_dict`` are."""


@torch.no_grad()
def step_memory(state: Mapping[str, Any]) -> StepMemory:
    """The memory of the parameters and the state of the optimizers in ``state``.

    Not in it, because it changes otherwise: buffers of modules, weights that an embedding
    renormalises in its forward, what an optimizer holds that is stepped without notice or has a
    mode of its own, models under the older FSDP, and whatever belongs to no optimizer, such as
    averaged weights.

    Args:
        state: As for ``save``.
    """
    objects = {key: _objects(value) for key, value in state.items()}
    modules = [item for items in objects.values() for item in items if isinstance(item, Module)]
    if any(map(is_fsdp1, modules)):
        return StepMemory((), ())  # it frees and fills its flat buffers in forward and backward
    owned = (
        held
        for key, items in objects.items()
        for optimizer in items
        if isinstance(optimizer, Optimizer) and _is_noticed(optimizer)
        for held in _held(key, optimizer)
    )
    return StepMemory(owned, (_local(t) for module in modules for t in _changing(module)))


def _objects(value: Any) -> list[Any]:
    if isinstance(value, Stepped):
        return list(value.step_objects)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_noticed(optimizer: Optimizer) -> bool:
    """Whether a hook runs before anything that changes what the optimizer holds."""
    return (
        getattr(type(optimizer).step, "hooked", False)
        # Replayed from a CUDA graph, without Python.
        and not any(group.get("capturable") for group in optimizer.param_groups)
        # Steps by other objects' hooks in the backward.
        and not isinstance(optimizer, ZeroRedundancyOptimizer)
        # Schedule-free ones swap weights in train() and eval().
        and not callable(getattr(optimizer, "eval", None))
    )


def _held(key: str, optimizer: Optimizer) -> Iterator[StepTensor]:
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            place = f"{key}.param_groups.{number}.params.{position}"
            tensors = {place: parameter}
            for name, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{place}.{name}"] = value
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    yield StepTensor(name, tensor, _local(tensor))


def _changing(module: Module) -> Iterator[torch.Tensor]:
    yield from module.buffers()
    for part in module.modules():
        if getattr(part, "max_norm", None) is not None:
            yield from part.parameters(recurse=False)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory; call it under ``torch.no_grad()``, else autograd makes a view of each."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StepGuard:
    """Makes every optimizer of the process wait, before it steps, until a save is staged."""

    def __init__(self) -> None:
        self._copies: Copies = AtOnce()
        self._hook: RemovableHandle | None = None

    def late_copies(self, state: Mapping[str, Any]) -> Copies:
        """The copies of a new save of ``state``, for which optimizers wait from now on."""
        copies = late_copies(step_memory(state))
        self.watch(copies)
        return copies

    def watch(self, copies: Copies) -> None:
        """From now on wait for these copies, and no others."""
        self._copies = copies
        if self._hook is None:
            # It stays until ``close``: torch walks its hooks without a lock, so that one must not
            # be removed in another thread, or from inside of itself.
            self._hook = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Watch no longer."""
        self._copies = AtOnce()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del optimizer, args, kwargs
        self._copies.drain()
