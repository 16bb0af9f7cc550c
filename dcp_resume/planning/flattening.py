"""Nested state dicts as flat leaves, each with its key path and dotted name.

Names follow DCP: keys joined by dots. Unlike DCP, a tuple that holds a tensor is flattened too, an
empty mapping is kept as a value, and the key path is recorded beside the name, so that ``{"0": x}``
and ``[x]`` come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dcp_resume.errors import Problem, UnsupportedLeaf
from dcp_resume.manifest.models import PathKey

__all__ = ["Path", "flatten", "fqn_of", "part_of", "path_of"]

Path = tuple[PathKey, ...]

_SIMPLE = frozenset({type(None), bool, int, float, str})
"""Types of values that hold no others."""


def fqn_of(path: Path) -> str:
    """Dotted name of a key path."""
    return ".".join(str(key["key"]) if isinstance(key, dict) else str(key) for key in path)


def path_of(fqn: str) -> Path:
    """Key path of a name that no nested state dict gave: the part, and the rest in one key."""
    head, _, rest = fqn.partition(".")
    return (head, rest) if rest else (head,)


def part_of(path: Path) -> str:
    """The part a leaf belongs to: its top-level key, or ``state`` for a leaf at the top."""
    return fqn_of(path[:1]) if len(path) > 1 else "state"


def flatten(state: Mapping[str, Any]) -> list[tuple[Path, object]]:
    """Each leaf of a state dict with its key path, in the state dict's own order.

    Mappings are always descended, lists and tuples where they hold a tensor.

    Raises:
        UnsupportedLeaf: A mapping key is neither a string nor an integer.
    """
    leaves: list[tuple[Path, object]] = []
    _walk(state, (), leaves)
    return leaves


def _walk(state: Mapping[Any, Any], path: Path, leaves: list[tuple[Path, object]]) -> None:
    for key, value in state.items():
        _visit((*path, key if type(key) is str else _path_key(key, path)), value, leaves)


def _visit(path: Path, value: object, leaves: list[tuple[Path, object]]) -> None:
    # These first: they are most of the leaves, and to ask whether they are mappings is slow.
    if isinstance(value, torch.Tensor) or type(value) in _SIMPLE:
        leaves.append((path, value))
    elif isinstance(value, Mapping) and value:
        _walk(value, path, leaves)
    elif isinstance(value, (list, tuple)) and _holds_tensor(value):
        for position, item in enumerate(value):
            _visit((*path, position), item, leaves)
    else:
        leaves.append((path, value))


def _holds_tensor(value: object) -> bool:
    if isinstance(value, torch.Tensor) or type(value) in _SIMPLE:
        return type(value) not in _SIMPLE
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensor, value))
    return False


def _path_key(key: object, path: Path) -> PathKey:
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return {"key": key}
    where = fqn_of(path) or "the state dict"
    problem = Problem(where, "key", f"mapping key {key!r} is neither a string nor an integer")
    raise UnsupportedLeaf(f"cannot save {problem}; use string keys", problems=(problem,))
