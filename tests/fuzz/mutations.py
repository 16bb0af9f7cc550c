"""Documents that are almost right: a node or a few bytes of a well-formed one exchanged."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

__all__ = ["HOSTILE", "mutated_bytes", "mutated_json", "settings_of"]

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
"""How many times as many examples to try; with more than 1 they differ from run to run."""


def settings_of(examples: int) -> settings:
    """So many examples, always the same ones, unless ``FUZZ_FACTOR`` asks for more."""
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


HOSTILE: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 255, 2**16, 2**31, 2**32 - 1, 2**53, 2**60, 2**62),
    *(
        2**63 - 1,
        2**63,
        2**64,
        10**300,
        10**4000,
        0.5,
        -0.0,
        1e308,
        "",
        " ",
        "0",
        "self",
        "catalog.json",
    ),
    *(
        "..",
        "../..",
        "/etc/passwd",
        "a/../b",
        "./a",
        "a//b",
        "x\0y",
        "\ud7ff",
        "A" * 5000,
        "a/" * 400,
    ),
    *(
        "step-00000001/a",
        "step-99999999/zzzz",
        "xxh3-128:" + "0" * 32,
        "uint8",
        "float64",
        "leaves",
    ),
    *("alias", "per_rank", "~per-rank.rng", "~leaves.data", "S(0)", "SS(0,9999999999)", "R"),
    *(
        [],
        {},
        [[]],
        [0] * 40,
        [2**62, 2**62],
        [2**60],
        {"key": 1},
        {"key": "k"},
        {"$int": "9" * 5000},
    ),
    *({"$tuple": 1}, {"$numpy": {"dtype": "<f8", "shape": [2**31, 2**31, 0], "data": ""}}),
    *(
        {"$float": "nan"},
        {"$set": [[]]},
        {"$dict": [[[], 1]]},
        {"$bytes": "?"},
        {"$enum": ["os.path", "sep"]},
    ),
]
"""Values that a field of any type might not expect."""


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _places(child, (*path, key))
    if isinstance(node, list):
        for number, child in enumerate(node):
            yield from _places(child, (*path, number))


def _at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


@st.composite
def mutated_json(draw: st.DrawFn, data: bytes) -> Any:
    """A document with one to three of its nodes exchanged, removed, repeated or renamed."""
    document = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return document
        *parent, last = draw(st.sampled_from(places))
        holder = _at(document, tuple(parent))
        action = draw(st.sampled_from(["hostile", "other", "remove", "repeat", "rename"]))
        if action == "hostile":
            holder[last] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif action == "other":
            holder[last] = copy.deepcopy(_at(document, draw(st.sampled_from(places))))
        elif action == "repeat" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "..", "$int", str(last).upper()]))] = holder.pop(
                last
            )
        else:
            del holder[last]
    return document


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four spots overwritten, cut out or filled."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(found)))
        stop = min(len(found), start + draw(st.integers(0, 9)))
        found[start:stop] = draw(
            st.binary(max_size=9)
            | st.sampled_from(
                [b'"', b"{", b"]", b"9" * 30, b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7]
            )
        )
    return bytes(found)
