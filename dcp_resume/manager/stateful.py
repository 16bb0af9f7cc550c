"""Turn what a trainer holds (modules, optimizers, Statefuls, values) into a state dict, and back.

Names are free of wrappers: DDP, FSDP and ``torch.compile`` prefixes are stripped, and optimizer
state is keyed by the parameter's FQN, never by index. Pipeline stages hand in their model parts as
a list; parts must use global layer names.
"""

from __future__ import annotations

from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import replace
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.fsdp1 import Fsdp1Optimizers, is_fsdp1
from dcp_resume.manager.optimizers import Optimizers, StoredPart, merge_disjoint
from dcp_resume.manager.parameter_names import named_state
from dcp_resume.manifest.report import ReportItem
from dcp_resume.planning.declarations import Declarations

__all__ = [
    "Bound",
    "Comparing",
    "OptimizerState",
    "RankStateful",
    "Stateful",
    "bind_state",
    "choose_state",
    "declarations_of",
    "optimizers_of",
    "without_optimizers",
]


Paths = Mapping[str, Sequence[Any]]
"""FQN → key path in the state dict."""


@runtime_checkable
class Stateful(Protocol):
    """Anything with DCP's pair of methods."""

    def state_dict(self) -> Mapping[str, Any]:
        """For saving."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """For loading."""


@runtime_checkable
class Comparing(Protocol):
    """A Stateful that says what differs from what was saved, before anything changes."""

    def differences(self, saved: Mapping[str, Any]) -> Iterable[ReportItem]:
        """Compare ``saved``, the values of its ``state_dict`` as saved, with what it is now.

        Tensors are absent from ``saved``; ``where`` of an item is relative to the object.
        """


@runtime_checkable
class RankStateful(Stateful, Protocol):
    """A Stateful with values of its own on each rank."""

    @property
    def per_rank(self) -> Sequence[str]:
        """Patterns of the names in its ``state_dict`` whose values differ between ranks."""

    def derive(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on from ``step`` without the values of this rank; called instead of a load.

        It is called on every rank, if ``differences`` found an item of kind ``rng`` on any.
        ``saved`` holds the values that all ranks share.
        """


class OptimizerState(Enum):
    """Whether optimizer state takes part in a save or a load."""

    AS_GIVEN = "as_given"
    """If the state handed in has an optimizer."""
    REQUIRED = "required"
    """Always; that there is none is an error."""
    LEFT_OUT = "left_out"
    """Never, even if the state, or the checkpoint, has it."""


class _Models:
    """The model parts of this rank, as one Stateful."""

    def __init__(self, key: str, parts: Sequence[Module]) -> None:
        self._key, self.parts = key, parts

    def state_dict(self) -> Mapping[str, Any]:
        merged: dict[str, Any] = {}
        for part in self.parts:
            state = get_model_state_dict(part) if is_fsdp1(part) else named_state(part)
            merge_disjoint(merged, state, self._key)
        return merged

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for part in self.parts:
            set_model_state_dict(part, dict(state_dict), options=StateDictOptions(strict=False))


class Bound:
    """A trainer's objects, bound to the state dict that is saved or loaded."""

    def __init__(
        self, state: Mapping[str, Any], keys: Collection[str], sources: Mapping[str, Stateful]
    ) -> None:
        self._state = state
        self._plain = {key: state[key] for key in keys if key not in sources}
        self._sources = sources
        self._dicts: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Ask every object for its state; tensors are the objects' own memory.

        Raises:
            ConfigurationError: An optimizer's state goes by positions.
        """
        self._dicts = {key: dict(source.state_dict()) for key, source in self._sources.items()}
        return _by_name({**self._plain, **self._dicts})

    def targets(self, stored: Callable[[str], StoredPart]) -> dict[str, Any]:
        """What to load into: the objects' own memory, and room for optimizer state.

        Args:
            stored: Says what the checkpoint holds below a key.

        Raises:
            ConfigurationError: An optimizer's state goes by positions.
        """
        self._dicts = {
            key: source.targets(stored(key))
            if isinstance(source, (Optimizers, Fsdp1Optimizers))
            else dict(source.state_dict())
            for key, source in self._sources.items()
        }
        return _by_name({**self._plain, **self._dicts})

    def undo(self) -> None:
        """Forget what asking for a state made, after a save or a failed load."""
        for source in self._sources.values():
            if isinstance(source, Fsdp1Optimizers):
                source.undo()

    def differences(self, values: Mapping[str, object], paths: Paths) -> Iterator[ReportItem]:
        """What the objects themselves find to differ, each under its key.

        Args:
            values: FQN → value as saved.
            paths: FQN → key path.
        """
        for key, source in self._sources.items():
            if isinstance(source, Comparing):
                for item in source.differences(_nested(values, paths, key)):
                    where = f"{key}.{item.where}" if item.where else key
                    yield replace(item, where=where)

    def apply(
        self,
        values: Mapping[str, object],
        paths: Paths,
        *,
        derived: Collection[str] = (),
        step: int = 0,
    ) -> None:
        """Put loaded non-tensor leaves into the state dicts, and hand these to their objects.

        Args:
            values: FQN → value.
            paths: FQN → key path in the state dict that ``state_dict`` returned.
            derived: Keys of the objects that go on without what they saved.
            step: Of the checkpoint.
        """
        with torch.no_grad():
            whole = {**self._plain, **self._dicts}
            for fqn, value in values.items():
                if len(paths[fqn]) > 1:
                    _set_path(whole, paths[fqn], value)
                elif fqn not in self._sources and isinstance(self._state, MutableMapping):
                    self._state[fqn] = value
            for key, source in self._sources.items():
                if key in derived and isinstance(source, RankStateful):
                    source.derive(_nested(values, paths, key), step)
                else:
                    source.load_state_dict(self._dicts[key])


def _by_name(state: dict[str, Any]) -> dict[str, Any]:
    """The state, unless it holds the state dict of an optimizer, which numbers the parameters.

    Raises:
        ConfigurationError: It does: in another order of parameters, moments would go astray.
    """
    for place in _numbering(state, ""):
        raise ConfigurationError(
            f"state{place} numbers the parameters of its groups, as an optimizer's state_dict() "
            f"does; of a model with another order of parameters, others would get the moments: "
            f"hand in the optimizer itself, or torch's get_optimizer_state_dict()",
            option=place,
        )
    return state


_HOLDING_NONE = (torch.Tensor, str, int, float, type(None))
"""Most of a state; to ask further what they are would be slow."""


def _numbering(value: object, place: str) -> Iterator[str]:
    """Places of optimizers' state dicts, as one would index the state."""
    if isinstance(value, Mapping):
        if any(_is_numbered(group) for group in _as_list(value.get("param_groups"))):
            yield place
        for key, below in value.items():
            if not isinstance(below, _HOLDING_NONE):
                yield from _numbering(below, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        for position, below in enumerate(value):
            yield from _numbering(below, f"{place}[{position}]")


def _is_numbered(group: object) -> bool:
    return isinstance(group, Mapping) and any(
        isinstance(parameter, int) for parameter in _as_list(group.get("params"))
    )


def _nested(values: Mapping[str, object], paths: Paths, key: str) -> dict[str, Any]:
    """The values below a top-level key, as the nested mapping they came from."""
    found: dict[str, Any] = {key: {}}
    for fqn, value in values.items():
        if paths[fqn][0] == key:
            _set_path(found, paths[fqn], value)
    below = found[key]
    return below if isinstance(below, dict) else {}


def _set_path(state: Any, path: Sequence[Any], value: object) -> None:
    keys = [key["key"] if isinstance(key, dict) else key for key in path]
    holders = [state]
    for key in keys[:-1]:
        # A mapping that was empty when the state was described may lack the way to the value.
        state = state.setdefault(key, {}) if isinstance(state, dict) else state[key]
        holders.append(state)
    for holder, key in zip(reversed(holders), reversed(keys), strict=True):
        if not isinstance(holder, tuple):
            holder[key] = value
            return
        value = (*holder[:key], value, *holder[key + 1 :])  # takes its place one level up


def bind_state(state: Mapping[str, Any], parts: Sequence[str] | None = None) -> Bound:
    """Recognise modules, lists of modules, optimizers and Statefuls among the values.

    An optimizer belongs to the model of the state; with several model parts hand in as many
    optimizers, in the same order.

    Args:
        state: What the trainer holds.
        parts: Top-level keys to bind, for all; the others are not asked for their state.

    Raises:
        ConfigurationError: An optimizer without a model, counts that differ, or an unknown part.
    """
    unknown = sorted(set(parts or ()) - state.keys())
    if unknown:
        raise ConfigurationError(
            f"parts {unknown} are not in the state, which has {sorted(state)}", option="parts"
        )
    models = {key: value for key, value in state.items() if _all_are(value, Module)}
    sources: dict[str, Stateful] = {}
    for key, value in state.items():
        if key in models:
            sources[key] = _Models(key, _as_list(value))
        elif _all_are(value, Optimizer):
            modules = [part for model in models.values() for part in _as_list(model)]
            optimizers = _as_list(value)
            if len(modules) != len(optimizers):
                raise ConfigurationError(
                    f"state[{key!r}] has {len(optimizers)} optimizer(s) for {len(modules)} model "
                    f"part(s); names of optimizer state come from the model: put the model into "
                    f"the state, one optimizer a part, in the same order",
                    option=key,
                )
            kind = Fsdp1Optimizers if any(map(is_fsdp1, modules)) else Optimizers
            sources[key] = kind(key, list(zip(modules, optimizers, strict=True)))
        elif isinstance(value, Stateful) and not isinstance(value, Mapping):
            sources[key] = value
    chosen = [key for key in state if parts is None or key in parts]
    return Bound(state, chosen, {key: sources[key] for key in chosen if key in sources})


def choose_state(state: Mapping[str, Any], optimizers: OptimizerState) -> dict[str, Any]:
    """The part of the state that takes part in a save.

    Raises:
        ConfigurationError: An optimizer is required, and there is none.
    """
    without = without_optimizers(state)
    if optimizers is OptimizerState.REQUIRED and len(without) == len(state):
        raise ConfigurationError(
            f"optimizer state is REQUIRED, and the state has no optimizer, only {sorted(state)}; "
            f"put it in, or set save_optimizer_state to LEFT_OUT",
            option="save_optimizer_state",
        )
    return without if optimizers is OptimizerState.LEFT_OUT else dict(state)


def without_optimizers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state without its optimizers."""
    optimizers = optimizers_of(state)
    return {key: value for key, value in state.items() if key not in optimizers}


def optimizers_of(state: Mapping[str, Any]) -> dict[str, list[Optimizer]]:
    """Key of each part of the state that is optimizers → those of this rank's model parts."""
    return {key: _as_list(value) for key, value in state.items() if _all_are(value, Optimizer)}


def declarations_of(declared: Declarations, state: Mapping[str, Any]) -> Declarations:
    """What the caller declared, and what objects of the state say of themselves."""
    per_rank, from_rank = list(declared.per_rank), dict(declared.from_rank)
    for key, value in state.items():
        if isinstance(value, RankStateful):
            per_rank.extend(f"{key}.{pattern}" for pattern in value.per_rank)
        for name in getattr(value, "of_coordinator", ()):
            from_rank.setdefault(f"{key}.{name}", 0)
    return replace(declared, per_rank=tuple(per_rank), from_rank=from_rank)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _all_are(value: object, kind: type) -> bool:
    items = _as_list(value)
    return bool(items) and all(isinstance(item, kind) for item in items)
