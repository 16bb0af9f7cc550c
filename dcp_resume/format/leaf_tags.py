"""One pair of functions for each type of leaf that ``leaves`` tags.

An encoder gets the value, its name and a function that encodes what it holds; a decoder gets the
tag's body and a function that decodes what it holds. A fault is a TypeError or ValueError; the
caller names the leaf.
"""

from __future__ import annotations

import base64
import enum
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from dcp_resume.format.dtypes import DTYPES, check_tensor
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.values import Json

__all__ = ["DECODERS", "ENCODERS", "OrderedPairs", "canonical", "register_enum", "type_name"]

Encode: TypeAlias = Callable[[object, str], Json]
Decode: TypeAlias = Callable[[Json], Any]

MAX_TENSOR_BYTES = 2**16
"""A larger tensor inside a tuple belongs into a data file, not into JSON."""

_EnumClass = TypeVar("_EnumClass", bound=type[enum.Enum])
_enums: dict[str, type[enum.Enum]] = {}

_TORCH_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_NUMPY_DTYPE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(8|16)|<U\d{1,9}")
_DEVICE = re.compile(r"[a-z]{1,20}(:\d{1,4})?")


def register_enum(cls: _EnumClass) -> _EnumClass:
    """Allow the members of an enum as leaves; usable as a decorator.

    Args:
        cls: Stored by module and qualified name, members by name. The program that loads must
            register it under the same name.

    Raises:
        ValueError: Another class has the name already.
    """
    name = type_name(cls)
    if _enums.setdefault(name, cls) is not cls:
        raise ValueError(f"another enum is registered as {name}")
    return cls


@dataclass(frozen=True, slots=True)
class OrderedPairs:
    """An OrderedDict on its way to its tag."""

    pairs: list[tuple[object, object]]


def type_name(kind: type) -> str:
    """Module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def canonical(value: Json) -> str:
    """JSON text without spaces; equal values give equal text."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _encode_enum(value: enum.Enum, where: str, _: Encode) -> Json:
    name = type_name(type(value))
    if _enums.get(name) is not type(value):
        raise TypeError(f"{where}: {name}; call dcp_resume's register_enum({type(value).__name__})")
    if type(value).__members__.get(value.name or "") is not value:
        raise TypeError(f"{where}: {value!r} is no single member of {name}; store its value")
    return {"$enum": [name, value.name]}


def _encode_numpy(value: np.ndarray[Any, Any] | np.generic, where: str, _: Encode) -> Json:
    array = np.asarray(value)
    # newbyteorder would misname what the bytes are; astype converts them.
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    is_plain = type(value) in (np.ndarray, array.dtype.type)
    if not is_plain or not _NUMPY_DTYPE.fullmatch(array.dtype.str):
        raise TypeError(
            f"{where}: {type_name(type(value))} of {array.dtype}; store its plain parts"
        )
    shape = None if isinstance(value, np.generic) else list(array.shape)
    return {"$numpy": {"dtype": array.dtype.str, "shape": shape, "data": _base64(array.tobytes())}}


def _encode_tensor(value: torch.Tensor, where: str, _: Encode) -> Json:
    problem = check_tensor(value, where)
    if problem or type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(problem.message if problem else f"{where}: {type_name(type(value))}")
    if value.nbytes > MAX_TENSOR_BYTES:
        raise TypeError(f"{where}: a tensor of {value.nbytes} bytes; hold it in a dict or list")
    dtype = str(value.dtype).removeprefix("torch.")
    return {
        "$tensor": {"dtype": dtype, "shape": list(value.shape), "data": _base64(as_bytes(value))}
    }


def _base64(data: bytes | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _encode_set(value: set[object] | frozenset[object], where: str, inner: Encode) -> Json:
    if type(value) not in (set, frozenset):
        raise TypeError(f"{where}: {type_name(type(value))}; store set(value)")
    # Sets have no order; replicas on other ranks must still give equal bytes.
    items = sorted((inner(item, where) for item in value), key=canonical)
    return {f"${type(value).__name__}": items}


def _encode_ordered(value: OrderedPairs, where: str, inner: Encode) -> Json:
    return {"$ordered_dict": [[inner(k, where), inner(v, f"{where}.{k}")] for k, v in value.pairs]}


def _encode_size(value: torch.Size, _: str, __: Encode) -> Json:
    return {"$size": [int(extent) for extent in value]}


ENCODERS: tuple[tuple[type | tuple[type, ...], Callable[[Any, str, Encode], Json]], ...] = (
    (enum.Enum, _encode_enum),
    ((np.ndarray, np.generic), _encode_numpy),
    (torch.Tensor, _encode_tensor),
    ((set, frozenset), _encode_set),
    (OrderedPairs, _encode_ordered),
    (torch.Size, _encode_size),
    (torch.dtype, lambda value, _, __: {"$dtype": str(value).removeprefix("torch.")}),
    (torch.device, lambda value, _, __: {"$device": str(value)}),
    (complex, lambda value, where, inner: {"$complex": inner([value.real, value.imag], where)}),
    (
        slice,
        lambda value, where, inner: {"$slice": inner([value.start, value.stop, value.step], where)},
    ),
)


def _decode_enum(body: Json, _: object) -> object:
    name, member = body
    if name not in _enums:
        raise ValueError(f"the enum {name} is not registered; call register_enum on it before")
    return _enums[name].__members__[member]


def _decode_numpy(body: Json, _: object) -> object:
    if not _NUMPY_DTYPE.fullmatch(body["dtype"]):
        raise ValueError(f"dtype {body['dtype']!r}")
    dtype, shape = np.dtype(body["dtype"]), _shape(body["shape"] or [])
    data = _exact(body["data"], dtype.itemsize, shape)
    array: Any = np.ndarray(shape, dtype, bytearray(data) or bytearray(1))
    if dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise ValueError("a bool is 0 or 1")
    if dtype.kind == "U" and np.frombuffer(data, "<u4").max(initial=0) > 0x10FFFF:
        raise ValueError("text beyond Unicode")
    return array[()] if body["shape"] is None else array


def _decode_tensor(body: Json, _: object) -> object:
    dtype, shape = DTYPES[body["dtype"]].torch_dtype, _shape(body["shape"])
    data = bytearray(_exact(body["data"], dtype.itemsize, shape))
    if not data:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool and max(data) > 1:
        raise ValueError("a bool is 0 or 1")
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def _shape(value: Json) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32:
        raise ValueError("a shape has at most 32 dimensions")
    if not all(type(extent) is int and 0 <= extent < 2**31 for extent in value):
        raise ValueError(f"shape {value}")
    return tuple(value)


def _exact(text: Json, itemsize: int, shape: tuple[int, ...]) -> bytes:
    data = base64.b64decode(text, validate=True)
    expected = itemsize
    for extent in shape:
        expected *= extent
    if len(data) != expected:
        raise ValueError(f"expected {expected} bytes, found {len(data)}")
    return data


def _decode_device(body: Json, _: object) -> torch.device:
    if not _DEVICE.fullmatch(body):
        raise ValueError(f"device {body!r}")
    return torch.device(body)


def _decode_slice(body: Json, inner: Decode) -> slice:
    start, stop, step = (inner(item) for item in body)
    return slice(start, stop, step)


def _decode_complex(body: Json, inner: Decode) -> complex:
    real, imaginary = (inner(item) for item in body)
    return complex(float(real), float(imaginary))


DECODERS: dict[str, Callable[[Any, Decode], object]] = {
    "$enum": _decode_enum,
    "$numpy": _decode_numpy,
    "$tensor": _decode_tensor,
    "$set": lambda body, inner: {inner(item) for item in body},
    "$frozenset": lambda body, inner: frozenset(inner(item) for item in body),
    "$ordered_dict": lambda body, inner: OrderedDict((inner(k), inner(v)) for k, v in body),
    "$size": lambda body, _: torch.Size(_shape(body)),
    "$dtype": lambda body, _: _TORCH_DTYPES[body],
    "$device": _decode_device,
    "$complex": _decode_complex,
    "$slice": _decode_slice,
}
