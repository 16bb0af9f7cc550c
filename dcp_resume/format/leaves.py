"""Non-tensor leaves as JSON: what training state holds beyond JSON's own types. Never pickle.

On top of the tags of ``manifest.values``:

    ``{"$dtype": "bfloat16"}``  ``{"$size": [2, 3]}``  ``{"$device": "cuda:0"}``   torch's own
    ``{"$tensor": {"dtype", "shape", "data"}}``   inside a tuple; comes back on the CPU
    ``{"$numpy": {"dtype", "shape", "data"}}``    an array; a scalar where ``shape`` is null
    ``{"$enum": [class, member]}``                of a class passed to ``register_enum``
    ``{"$complex": [re, im]}``  ``{"$slice": [start, stop, step]}``
    ``{"$set": […]}``  ``{"$frozenset": […]}``  ``{"$ordered_dict": [[key, value], …]}``

Decoding builds values only. It imports nothing: a class that is not registered is an error.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from dcp_resume.errors import InvalidDocument, Problem, UnsupportedLeaf
from dcp_resume.format.leaf_tags import (
    DECODERS,
    ENCODERS,
    OrderedPairs,
    canonical,
    register_enum,
    type_name,
)
from dcp_resume.format.strict_json import load_strict
from dcp_resume.manifest.values import Json, decode_value, encode_value

__all__ = [
    "LeafPacker",
    "decode_leaf",
    "encode_leaf",
    "pack_leaves",
    "register_enum",
    "unpack_leaves",
]

_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What numpy, torch and Python raise where a tagged value is not what its tag says."""

MAX_DEPTH = 64
MAX_JSON_DEPTH = 72
"""Most levels of an encoded leaf, of which one of the value makes up to three. The documents that
hold leaves are refused beyond 80: what is saved must be readable."""


def encode_leaf(value: object, fqn: str) -> Json:
    """Encode one non-tensor leaf.

    Args:
        value: The leaf, with whatever it holds.
        fqn: Its name.

    Raises:
        UnsupportedLeaf: It or something inside it has no form without pickle; the message names
            the place, the type and the remedy.
    """
    try:
        encoded = encode_value(_mark(value, fqn, 0), where=fqn, extension=_encode_other)
        _check_depth(encoded, fqn)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"cannot be stored without pickle: {error}"
        problem = Problem(fqn, "leaf", message)
        raise UnsupportedLeaf(f"{fqn} {message}", problems=(problem,)) from error
    return encoded


def _check_depth(encoded: Json, where: str) -> None:
    level = [encoded]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"{where}: nested too deep, {MAX_JSON_DEPTH} levels of JSON; flatten it")


def _mark(value: object, where: str, depth: int) -> object:
    """Refuse or mark what ``encode_value`` would store as a plain dict or text, and so change."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {MAX_DEPTH} levels")
    kind = type(value)
    if kind is str:
        assert isinstance(value, str)
        value.encode()  # a lone surrogate has no UTF-8 and would fail at the manifest
    if kind is list or kind is tuple:
        assert isinstance(value, (list, tuple))
        return kind(_mark(item, f"{where}.{n}", depth + 1) for n, item in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    pairs = [
        (_mark(key, f"{where}.{key}", depth + 1), _mark(item, f"{where}.{key}", depth + 1))
        for key, item in value.items()
    ]
    if kind is dict:
        return dict(pairs)
    if kind is OrderedDict:
        return OrderedPairs(pairs)
    raise TypeError(f"{where}: {type_name(kind)}; store dict(value)")


def _encode_other(value: object, where: str) -> Json:
    def inner(item: object, inner_where: str) -> Json:
        return encode_value(item, where=inner_where, extension=_encode_other)

    for kinds, encode in ENCODERS:
        if isinstance(value, kinds):
            return encode(value, where, inner)
    raise TypeError(f"{where}: {type_name(type(value))}; {_remedy(value)}")


def _remedy(value: object) -> str:
    if hasattr(value, "__fspath__"):
        return "store str(value)"
    if hasattr(value, "isoformat"):
        return "store value.isoformat()"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return "store dataclasses.asdict(value)"
    if isinstance(value, torch.Generator):
        return "store value.get_state()"
    if callable(value):
        return "code is not state; leave it out, or store a name that you look up yourself"
    return "store it as JSON types, numpy arrays or tensors, or give it state_dict()"


def decode_leaf(value: Json, fqn: str) -> object:
    """Decode what ``encode_leaf`` made.

    Raises:
        InvalidDocument: An unknown tag, an enum that is not registered, or a malformed value.
    """
    try:
        return decode_value(value, where=fqn, extension=_decode_other)
    except (TypeError, ValueError, RecursionError) as error:
        problem = Problem(fqn, "leaf", str(error))
        raise InvalidDocument(f"{fqn} cannot be decoded: {error}", problems=(problem,)) from error


def _decode_other(tag: str, body: Json, where: str) -> object:
    decoder = DECODERS.get(tag)
    if decoder is None:
        raise ValueError(f"{where}: unknown tag {tag!r}; a newer version may have written it")

    def inner(item: Json) -> Any:
        return decode_value(item, where=where, extension=_decode_other)

    try:
        return decoder(body, inner)
    except _MALFORMED as error:
        raise ValueError(f"{where}: malformed {tag} value ({error})") from error


Packable = tuple[tuple[Any, ...], Json]
"""A leaf's key path in the state dict, and its encoded value."""


def pack_leaves(leaves: Mapping[str, Packable]) -> bytes:
    """The leaves of one rank as canonical JSON; equal leaves give equal bytes.

    Args:
        leaves: By FQN.

    Returns:
        UTF-8, without spaces, sorted by FQN; mappings inside values keep their order.
    """
    return LeafPacker().pack(leaves)


class LeafPacker:
    """Packs leaves again and again, and spells out only those that are other objects than before.

    A leaf that was handed in must not be changed afterwards.
    """

    def __init__(self) -> None:
        self._spelt: dict[str, tuple[Packable, str]] = {}

    def pack(self, leaves: Mapping[str, Packable]) -> bytes:
        """As ``pack_leaves``."""
        before, spelt = self._spelt, dict[str, tuple[Packable, str]]()
        for fqn in sorted(leaves):
            leaf, known = leaves[fqn], before.get(fqn)
            if known is None or known[0] is not leaf:
                known = (leaf, _spell(fqn, leaf))
            spelt[fqn] = known
        self._spelt = spelt
        return f'{{"leaves":[{",".join(text for _, text in spelt.values())}]}}'.encode()


def _spell(fqn: str, leaf: Packable) -> str:
    path, value = leaf
    return canonical({"fqn": fqn, "path": list(path), "value": value})


def unpack_leaves(data: bytes, where: str) -> dict[str, tuple[tuple[Any, ...], Json]]:
    """Read back what ``pack_leaves`` wrote; the values are still encoded.

    Raises:
        InvalidDocument: No strict JSON, another structure, or an FQN twice.
    """
    try:
        document = load_strict(bytes(data))
        if not isinstance(document, dict) or set(document) != {"leaves"}:
            raise ValueError("expected an object of leaves")
        found = dict(_read_leaf(entry) for entry in document["leaves"])
        if len(found) != len(document["leaves"]):
            raise ValueError("an FQN occurs twice")
    except (TypeError, ValueError) as error:
        problem = Problem(where, "leaves", str(error))
        message = f"{where} holds no valid leaves: {error}"
        raise InvalidDocument(message, problems=(problem,)) from error
    return found


def _read_leaf(entry: Json) -> tuple[str, tuple[tuple[Any, ...], Json]]:
    if not isinstance(entry, dict) or set(entry) != {"fqn", "path", "value"}:
        raise ValueError("expected fqn, path and value in each leaf")
    fqn, path = entry["fqn"], entry["path"]
    if not isinstance(fqn, str) or not isinstance(path, list):
        raise ValueError("expected text as fqn and a list as path")
    if not path or not all(_is_path_key(key) for key in path):
        raise ValueError(f"{fqn}: malformed path")
    return fqn, (tuple(path), entry["value"])


def _is_path_key(key: Json) -> bool:
    if isinstance(key, dict):
        return set(key) == {"key"} and type(key["key"]) is int
    return type(key) in (str, int)
