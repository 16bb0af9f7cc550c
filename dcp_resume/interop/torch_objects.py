"""What the objects of torch mean in an inert pickle, both ways: tensors, dtypes, plain values."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.interop.inert_pickle import Called, Named, Persistent
from dcp_resume.planning.flattening import Path, fqn_of

__all__ = [
    "StoredView",
    "Unknown",
    "flatten_leaves",
    "leaf_problem",
    "plain",
    "tensor_tree",
    "unknown_in",
    "value_tree",
]

MAX_NODES = 20_000_000
"""A pickle of a few bytes can name one list in another a billion times over."""
MAX_DEPTH = 100

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "",
}
_NAMES = {dtype: name for name, dtype in _STORAGES.items() if dtype}
_EMPTY = Called(Named("collections", "OrderedDict"), ())


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor: a strided view of a storage."""

    storage: str
    dtype: str
    offset: int
    """In elements."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """An object that is neither a tensor nor a plain value."""

    name: str


def plain(node: Any) -> Any:
    """An inert tree as values, ``StoredView`` and ``Unknown``; nothing of it is executed.

    Raises:
        ValueError: Nested too deep, of more nodes than any state, or a tensor that is malformed.
    """
    try:
        return _Reading().plain(node, 0)
    except (LookupError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(
            f"an object of torch with other arguments than its own ({error})"
        ) from error


class _Reading:
    """Counts the nodes of one tree."""

    def __init__(self) -> None:
        self._num_nodes = 0

    def plain(self, node: Any, depth: int) -> Any:
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            raise ValueError(f"deeper than {MAX_DEPTH} levels, or more than {MAX_NODES} nodes")
        if isinstance(node, Mapping):
            return {key: self.plain(item, depth + 1) for key, item in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(self.plain(item, depth + 1) for item in node)
        if isinstance(node, Named):
            is_dtype = node.module == "torch" and node.name in DTYPES
            return DTYPES[node.name].torch_dtype if is_dtype else Unknown(str(node))
        if isinstance(node, Called):
            return self._called(node, depth)
        return Unknown("a storage") if isinstance(node, Persistent) else node

    def _called(self, node: Called, depth: int) -> Any:
        args = node.args if isinstance(node.args, tuple) else ()
        if node.name == "collections.OrderedDict" and not args:
            return OrderedDict((key, self.plain(item, depth + 1)) for key, item in node.pairs)
        if node.name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return _view(args)
        if node.name.startswith("torch._utils._rebuild_parameter") and args:
            return self.plain(args[0], depth + 1)
        if node.name == "torch.Size" and len(args) == 1:
            return torch.Size(_integers(args[0]))
        if node.name == "builtins.set":
            return set(self.plain(args[0] if args else node.items, depth + 1))
        if node.name == "_codecs.encode" and args[1:] == ("latin1",) and type(args[0]) is str:
            return args[0].encode("latin1")  # bytes, as protocol 2 has them
        if node.name == "builtins.complex" and all(type(arg) is float for arg in args):
            return complex(*args)
        return Unknown(node.name or "an object")


def _view(args: tuple[Any, ...]) -> StoredView:
    reference = args[0].value if isinstance(args[0], Persistent) else None
    if not isinstance(reference, tuple) or len(reference) < 5 or reference[0] != "storage":
        raise ValueError("a tensor without a storage")
    kind, key = reference[1], reference[2]
    dtype = _STORAGES.get(kind.name if isinstance(kind, Named) else "")
    if len(args) > 6 and isinstance(args[6], Named):
        dtype = args[6].name
    if not dtype or dtype not in DTYPES or not isinstance(key, str):
        raise ValueError(f"a tensor of storage {kind}, which cannot be stored")
    (offset,) = _integers((args[1],))
    return StoredView(key, dtype, offset, _integers(args[2]), _integers(args[3]))


def _integers(node: Any) -> tuple[int, ...]:
    if isinstance(node, Called) and node.name == "torch.Size" and isinstance(node.args, tuple):
        node = node.args[0]
    if not isinstance(node, (tuple, list)) or len(node) > 64:
        raise ValueError(f"expected integers, found {type(node).__name__}")
    if not all(type(item) is int and 0 <= item < 2**62 for item in node):
        raise ValueError("expected integers from 0 on")
    return tuple(node)


def flatten_leaves(value: Any, path: Path = (), depth: int = 0) -> Iterator[tuple[Path, Any]]:
    """Each leaf with its key path: mappings are descended, lists where they hold a tensor.

    Raises:
        ValueError: A key is neither text nor an integer.
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            if type(key) not in (str, int):
                raise ValueError(f"{fqn_of(path) or 'the root'}: key {key!r} is no text")
            step: Any = key if isinstance(key, str) else {"key": key}
            yield from flatten_leaves(item, (*path, step), depth + 1)
    elif isinstance(value, (list, tuple)) and _holds(value, StoredView):
        for number, item in enumerate(value):
            yield from flatten_leaves(item, (*path, number), depth + 1)
    else:
        yield path, value


def unknown_in(value: Any) -> str | None:
    """The name of an object inside a value that no value can be made of."""
    if isinstance(value, Unknown):
        return value.name
    items: Any = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, list, tuple, set)):
        return next((name for item in items if (name := unknown_in(item))), None)
    return None


def _holds(value: Any, kind: type) -> bool:
    if isinstance(value, kind):
        return True
    items: Any = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list, tuple)) and any(_holds(item, kind) for item in items)


def tensor_tree(storage: str, dtype: str, shape: Sequence[int], strides: Sequence[int]) -> Called:
    """A whole storage as a tensor of torch."""
    numel = math.prod(shape)
    size, stride, legacy = tuple(shape), tuple(strides), _NAMES.get(dtype)
    if legacy is not None:
        place = Persistent(("storage", Named("torch", legacy), storage, "cpu", numel))
        args: tuple[Any, ...] = (place, 0, size, stride, False, _EMPTY)
        return Called(Named("torch._utils", "_rebuild_tensor_v2"), args)
    num_bytes = numel * DTYPES[dtype].itemsize
    kind = Named("torch.storage", "UntypedStorage")
    place = Persistent(("storage", kind, storage, "cpu", num_bytes))
    args = (place, 0, size, stride, False, _EMPTY, Named("torch", dtype))
    return Called(Named("torch._utils", "_rebuild_tensor_v3"), args)


def value_tree(value: Any) -> Any:
    """A plain value as an inert tree.

    Raises:
        TypeError: It is none that ``torch.load(weights_only=True)`` reads back as it is.
    """
    if isinstance(value, torch.Size):
        return Called(Named("torch", "Size"), (tuple(value),))
    if isinstance(value, torch.dtype):
        return Named("torch", str(value).removeprefix("torch."))
    if type(value) is OrderedDict:
        pairs = [(key, value_tree(item)) for key, item in value.items()]
        return Called(Named("collections", "OrderedDict"), (), pairs=pairs)
    if type(value) is dict:
        return {value_tree(key): value_tree(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(value_tree(item) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__}")


def leaf_problem(name: str, value: Any) -> Problem | None:
    """Why a value cannot be exported into a pickle, or None."""
    try:
        value_tree(value)
    except TypeError as error:
        return Problem(name, "value", f"{error} is no value that a weights-only load reads")
    return None
