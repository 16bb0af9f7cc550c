"""Where two encoded values differ: the place inside them, and what stands there. Pure.

Values are compared as they are stored, so 1, 1.0 and True differ, 0.0 and -0.0 differ, and a NaN
equals itself. The order of a mapping's keys does not count, but of one that says it is ordered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dcp_resume.format.leaves import decode_leaf
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.values import Json

__all__ = ["ValueDifference", "compare_values"]

_ARRAYS = ("$numpy", "$tensor")
_MAX_TEXT = 60


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """One non-tensor leaf that differs."""

    fqn: str
    part: str
    ranks: tuple[int, ...]
    """Ranks whose value differs; empty for a value that all ranks share."""
    place: str
    """Of the first difference, inside the value, such as ``[2].state``; empty for the whole."""
    a: str
    """What stands there, shortened."""
    b: str
    num_different: int
    """Places inside the value that differ; of a per-rank value on the first of ``ranks``."""

    def __str__(self) -> str:
        text = f"{self.fqn}{self.place}"
        if self.ranks:
            text += f" on rank(s) {', '.join(map(str, self.ranks))}"
        text += f": {self.a} and {self.b}"
        more = self.num_different - 1
        return f"{text}; {more} more place(s) of it differ" if more else text


class _Place(NamedTuple):
    path: str
    a: str
    b: str


def compare_values(
    fqn: str, part: str, a: Json, b: Json, ranks: Sequence[int] = ()
) -> ValueDifference | None:
    """The first difference of two encoded values; None if they are equal.

    Raises:
        InvalidDocument: An array inside a value is malformed.
    """
    places = [] if _text(a) == _text(b) else list(_places(a, b, ""))
    if not places:
        return None
    return ValueDifference(fqn, part, tuple(ranks), *places[0], num_different=len(places))


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def _places(a: Json, b: Json, path: str) -> Iterator[_Place]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            if key in _ARRAYS:
                yield from _array_places(key, a, b, path)
            else:
                # The tag of a tuple or a mapping is no part of the place that a reader looks for.
                yield from _places(a[key], b[key], path if key.startswith("$") else f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, pair in enumerate(zip(a, b, strict=True)):
            yield from _places(*pair, f"{path}[{number}]")
    elif _text(a) != _text(b):
        yield _Place(path, _shown(a), _shown(b))


def _array_places(tag: str, a: Json, b: Json, path: str) -> Iterator[_Place]:
    array_a, array_b = (decode_leaf(value, f"value{path}") for value in (a, b))
    mine, other = a[tag], b[tag]
    if (mine["dtype"], mine["shape"]) != (other["dtype"], other["shape"]):
        yield _Place(path, _shape_text(mine), _shape_text(other))
        return
    shape = tuple(mine["shape"] or ())
    count = math.prod(shape)
    bytes_a, bytes_b = (_bytes(array).reshape(count, -1) for array in (array_a, array_b))
    for number in np.flatnonzero((bytes_a != bytes_b).any(axis=1)).tolist():
        index = tuple(int(i) for i in np.unravel_index(number, shape)) if shape else ()
        where = f"{path}[{', '.join(map(str, index))}]" if shape else path
        yield _Place(where, _element(array_a, index), _element(array_b, index))


def _bytes(array: Any) -> npt.NDArray[np.uint8]:
    """uint8[bytes] of a numpy array or scalar, or of a tensor."""
    if isinstance(array, torch.Tensor):
        return np.frombuffer(as_bytes(array), np.uint8)
    return np.frombuffer(np.asarray(array).tobytes(), np.uint8)


def _element(array: Any, index: tuple[int, ...]) -> str:
    return str(array[index].item() if isinstance(array, torch.Tensor) else np.asarray(array)[index])


def _shape_text(body: Mapping[str, Any]) -> str:
    return f"{body['dtype']} of shape {body['shape']}"


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
