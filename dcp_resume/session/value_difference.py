"""Where two encoded values differ: the place inside them, and what stands there. Pure.

Values are compared as they are stored, so 1, 1.0 and True differ, 0.0 and -0.0 differ, and a NaN
equals itself. The order of a mapping's keys does not count.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dcp_resume.format.leaves import decode_leaf
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
    """The first difference of two encoded values; None if they are equal."""
    if _text(a) == _text(b):
        return None
    places = list(_places(a, b, ""))
    first = places[0]
    return ValueDifference(fqn, part, tuple(ranks), *first, num_different=len(places))


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
    mine, other = a[tag], b[tag]
    if (mine["dtype"], mine["shape"]) != (other["dtype"], other["shape"]):
        yield _Place(path, _shape_text(mine), _shape_text(other))
        return
    bytes_a, bytes_b = (np.frombuffer(base64.b64decode(x["data"]), np.uint8) for x in (mine, other))
    shape = tuple(mine["shape"] or ())
    count = int(np.prod(shape, dtype=np.int64))
    rows = (bytes_a != bytes_b).reshape(count, -1).any(axis=1)
    array_a, array_b = (np.asarray(_elements(x)) for x in (a, b))
    for number in np.flatnonzero(rows).tolist():
        index = np.unravel_index(number, shape) if shape else ()
        where = f"{path}[{', '.join(str(int(i)) for i in index)}]" if shape else path
        yield _Place(where, str(array_a[index]), str(array_b[index]))


def _elements(encoded: Mapping[str, Any]) -> Any:
    found: Any = decode_leaf(encoded, "value")
    if "$numpy" in encoded:
        return found
    # numpy has no bfloat16 and no float8.
    return found.float().numpy() if found.is_floating_point() else found.numpy()


def _shape_text(body: Mapping[str, Any]) -> str:
    return f"{body['dtype']} of shape {body['shape']}"


def _shown(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
