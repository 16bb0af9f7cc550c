"""Optimizer state, keyed by the FQN of the parameter that it belongs to, never by index.

``state.<fqn>.<name>`` and ``param_groups.<fqn>.<option>``, as torch's flattened optimizer state
dicts have them. Room for what a checkpoint holds is made from its catalog: torch's own way, a step
with zero gradients, moves weights of some optimizers and refuses others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from dcp_resume.errors import ConfigurationError, DuplicateFqn, Problem
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.manager.parameter_names import named_parameters
from dcp_resume.manifest.models import PathKey, TensorEntry
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.planning.parameters import EXECUTION

__all__ = ["Optimizers", "StoredPart", "inner_optimizer", "merge_disjoint"]

SCHEDULED = frozenset({"lr", "initial_lr"})
"""Group options that a scheduler moves; that they differ at the start of a resume says nothing."""

Path = tuple[PathKey, ...]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What a checkpoint holds below one top-level key."""

    tensors: Mapping[Path, TensorEntry] = field(default_factory=dict)
    """Key path below the top-level key → catalog entry."""
    values: Iterable[Path] = ()
    """Key paths of the non-tensor leaves."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """FQN of a model parameter → its global shape as stored."""


class Optimizers:
    """The optimizers of this rank, as one Stateful.

    Args:
        key: Top-level key in the state.
        pairs: Each model part with its optimizer.

    Raises:
        ConfigurationError: An optimizer holds a parameter that is not its model's.
    """

    def __init__(self, key: str, pairs: Sequence[tuple[Module, Optimizer]]) -> None:
        self._key = key
        self._owned = [_Owned.of(key, model, optimizer) for model, optimizer in pairs]

    def state_dict(self) -> dict[str, Any]:
        """What the optimizers hold; nothing is made for parameters they have not stepped yet."""
        merged: dict[str, Any] = {}
        for owned in self._owned:
            found = {
                f"state.{fqn}.{name}": value
                for fqn, parameter in owned.local.items()
                for name, value in owned.state.get(parameter, {}).items()
            }
            merge_disjoint(merged, {**found, **owned.options()}, self._key)
        return merged

    def targets(self, stored: StoredPart) -> dict[str, Any]:
        """A state dict with room for what is stored; no optimizer changes.

        Tensors that an optimizer holds in the right form are used, others are made.
        """
        leaves: dict[str, dict[Path, object]] = {}
        for path, entry in stored.tensors.items():
            leaves.setdefault(str(path[0]), {})[path[1:]] = entry
        for path in stored.values:
            leaves.setdefault(str(path[0]), {})[path[1:]] = None
        merged: dict[str, Any] = {}
        for owned in self._owned:
            found: dict[str, Any] = {}
            for name, below in leaves.items():
                fqn = owned.parameter_of(name)
                if fqn is None:
                    continue
                parameter = owned.local[fqn]
                live = owned.state.get(parameter, {}).get(name[len(f"state.{fqn}.") :])
                made = {
                    path: _room(entry, parameter, owned, stored.shapes.get(fqn, ()))
                    if isinstance(entry, TensorEntry)
                    else None
                    for path, entry in below.items()
                }
                found[name] = _assemble(made, live)
            merge_disjoint(merged, {**found, **owned.options()}, self._key)
        return merged

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """Options that differ from those saved, and groups that were cut otherwise."""
        for owned in self._owned:
            for number, (names, group) in enumerate(owned.groups()):
                for option in sorted(set(group) - EXECUTION):
                    found = [saved.get(f"param_groups.{fqn}.{option}", _ABSENT) for fqn in names]
                    present = [value for value in found if value is not _ABSENT]
                    if present and any(value != present[0] for value in present):
                        message = (
                            f"parameters of group {number} were saved with {present[0]!r} and "
                            f"others; group them as they were"
                        )
                        where = f"param_groups.{number}.{option}"
                        yield ReportItem(Severity.REFUSE, "optimizer", where, message)
                    elif present and option not in SCHEDULED and present[0] != group[option]:
                        message = f"saved {present[0]!r}, now {group[option]!r}: the saved is taken"
                        where = f"param_groups.{number}.{option}"
                        yield ReportItem(Severity.WARN, "optimizer", where, message)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what ``targets`` made room for, once it was read; stale state is dropped."""
        for owned in self._owned:
            fresh: dict[Parameter, dict[str, Any]] = {}
            for name, value in state_dict.items():
                fqn = owned.parameter_of(name)
                if fqn is not None:
                    item = name[len(f"state.{fqn}.") :]
                    fresh.setdefault(owned.local[fqn], {})[item] = value
            owned.state.clear()
            owned.state.update(fresh)
            for names, group in owned.groups():
                for option in set(group) - EXECUTION:
                    for fqn in names[:1]:
                        name = f"param_groups.{fqn}.{option}"
                        group[option] = state_dict.get(name, group[option])


_ABSENT = object()


@dataclass(frozen=True, slots=True)
class _Owned:
    """One optimizer and the names of its parameters."""

    optimizer: Optimizer
    names: Mapping[Parameter, str]
    """Of every parameter in its groups."""
    local: Mapping[str, Parameter]
    """Of those whose state this rank holds: all, but under ``ZeroRedundancyOptimizer``."""
    state: dict[Any, dict[str, Any]]

    @classmethod
    def of(cls, key: str, model: Module, optimizer: Optimizer) -> _Owned:
        known = {parameter: fqn for fqn, parameter in named_parameters(model)}
        names: dict[Parameter, str] = {}
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter not in known:
                    raise ConfigurationError(
                        f"state[{key!r}]: parameter {position} of group {number}, shape "
                        f"{tuple(parameter.shape)}, belongs to no model of the state, so it has no "
                        f"name; make it a parameter of the model",
                        option=key,
                    )
                names[parameter] = known[parameter]
        inner = inner_optimizer(optimizer)
        held = [p for group in inner.param_groups for p in group["params"]]
        return cls(optimizer, names, {names[p]: p for p in held}, inner.state)

    def groups(self) -> Iterator[tuple[list[str], dict[str, Any]]]:
        for group in self.optimizer.param_groups:
            yield [self.names[parameter] for parameter in group["params"]], group

    def options(self) -> dict[str, Any]:
        return {
            f"param_groups.{fqn}.{option}": value
            for names, group in self.groups()
            for fqn in names
            for option, value in group.items()
            if option not in EXECUTION
        }

    def parameter_of(self, name: str) -> str | None:
        """The parameter of this rank that ``state.<fqn>.<name>`` belongs to."""
        if not name.startswith("state."):
            return None
        fqn = name.removeprefix("state.")
        while "." in fqn:
            fqn = fqn.rpartition(".")[0]
            if fqn in self.local:
                return fqn
        return None

    def is_on_device(self, parameter: Parameter) -> bool:
        """Whether step counts live beside the parameter, as fused and capturable steps want."""
        for group in self.optimizer.param_groups:
            if any(parameter is other for other in group["params"]):
                return bool(group.get("capturable") or group.get("fused"))
        return False


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Which optimizer holds this rank's state: the one inside ``ZeroRedundancyOptimizer``."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        inner: Optimizer = optimizer.optim
        return inner
    return optimizer


def _room(
    entry: TensorEntry, parameter: Parameter, owned: _Owned, stored_shape: tuple[int, ...]
) -> torch.Tensor:
    dtype = DTYPES[entry.dtype].torch_dtype
    if not entry.global_shape:
        device = parameter.device if owned.is_on_device(parameter) else torch.device("cpu")
        return torch.zeros((), dtype=dtype, device=device)
    # Of a parameter that a declared layout cuts, the local shape says nothing; what was stored in
    # the shape of the parameter belongs to it element by element.
    if entry.global_shape in (tuple(parameter.shape), stored_shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(entry.global_shape, dtype=dtype, device=parameter.device)


def _assemble(leaves: Mapping[Path, object], live: object) -> Any:
    """One value from its leaves: itself, or the mapping or list that they lie in."""
    if () in leaves:
        made = leaves[()]
        return live if _is_alike(live, made) else made
    heads: dict[str, dict[Path, object]] = {}
    keys: dict[str, PathKey] = {}
    for path, leaf in leaves.items():
        name = repr(path[0])  # a mapping key that is an integer is not a list position
        keys[name] = path[0]
        heads.setdefault(name, {})[path[1:]] = leaf
    parts = {name: _assemble(below, None) for name, below in heads.items()}
    if all(isinstance(key, int) for key in keys.values()):
        return [parts[name] for name in sorted(parts, key=int)]
    return {key["key"] if isinstance(key, dict) else key: parts[name] for name, key in keys.items()}


def _is_alike(live: object, made: object) -> bool:
    return (
        isinstance(live, torch.Tensor)
        and isinstance(made, torch.Tensor)
        and type(live) is type(made)
        and live.shape == made.shape
        and live.dtype == made.dtype
        and live.device == made.device
    )


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
