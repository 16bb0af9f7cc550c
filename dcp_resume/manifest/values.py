"""Non-tensor values as JSON, without loss and without pickle.

JSON types stand for themselves. What JSON cannot say is tagged by an object with one key:

    ``{"$float": "inf"}``          a non-finite float (``inf``, ``-inf``, ``nan``)
    ``{"$int": "9007199254740993"}``   an integer beyond ±2^53
    ``{"$tuple": […]}``            a tuple
    ``{"$bytes": "…"}``            bytes, base64
    ``{"$dict": [[key, value], …]}``   a mapping with a key that is no string or begins with ``$``

Other tags (numpy, torch, enums) belong to ``format.leaves``, which extends this module by a pair
of functions. Decoding builds values only; it never imports, calls or constructs a named type.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Json", "decode_value", "encode_value"]

Json = Any
"""A value that ``json`` writes and reads unchanged: None, bool, int, float, str, list, dict."""

_EXACT_INT = 2**53
_MAX_DIGITS = 4096
_DECIMAL = re.compile(rf"-?[0-9]{{1,{_MAX_DIGITS}}}")
_MAX_DEPTH = 64

Encoder = Callable[[object, str], Json]
Decoder = Callable[[str, Json, str], object]


def _no_encoder(value: object, where: str) -> Json:
    raise TypeError(f"{where}: {type(value).__module__}.{type(value).__qualname__}")


def _no_decoder(tag: str, _: Json, where: str) -> object:
    raise ValueError(f"{where}: unknown tag {tag!r}")


def encode_value(
    value: object, *, where: str, extension: Encoder = _no_encoder, depth: int = 0
) -> Json:
    """Encode one value.

    Args:
        value: The value.
        where: Its FQN, for messages.
        extension: Encodes what this module does not know, or raises TypeError.
        depth: Nesting of the caller.

    Raises:
        TypeError: A type that cannot be stored; the message is ``where: type``.
        ValueError: Nested deeper than 64 levels.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {_MAX_DEPTH} levels")

    def inner(item: object, suffix: object) -> Json:
        return encode_value(item, where=f"{where}.{suffix}", extension=extension, depth=depth + 1)

    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        assert isinstance(value, int)
        if value.bit_length() > _MAX_DIGITS * 3:
            raise ValueError(f"{where}: an integer of {value.bit_length()} bits is too long")
        return value if -_EXACT_INT <= value <= _EXACT_INT else {"$int": str(value)}
    if kind is float:
        assert isinstance(value, float)
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list or kind is tuple:
        assert isinstance(value, (list, tuple))
        items = [inner(item, index) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind is bytes:
        assert isinstance(value, bytes)
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return _encode_mapping(value, inner)
    return extension(value, where)


def _encode_mapping(value: Mapping[Any, object], inner: Callable[[object, object], Json]) -> Json:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: inner(item, key) for key, item in value.items()}
    return {"$dict": [[inner(key, key), inner(item, key)] for key, item in value.items()]}


def decode_value(
    value: Json, *, where: str, extension: Decoder = _no_decoder, depth: int = 0
) -> object:
    """Decode what ``encode_value`` made.

    Raises:
        ValueError: An unknown tag, a malformed tagged value, or nesting beyond 64 levels.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {_MAX_DEPTH} levels")

    def inner(item: Json) -> object:
        return decode_value(item, where=where, extension=extension, depth=depth + 1)

    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    tags = [key for key in value if key.startswith("$")]
    if not tags:
        return {key: inner(item) for key, item in value.items()}
    if len(value) != 1:
        raise ValueError(f"{where}: a tagged value has exactly one key, found {sorted(value)}")
    tag = tags[0]
    decoder = _DECODERS.get(tag)
    if decoder is None:
        return extension(tag, value[tag], where)
    try:
        return decoder(value[tag], inner)
    except (TypeError, ValueError, KeyError, AttributeError, binascii.Error) as error:
        raise ValueError(f"{where}: malformed {tag} value ({error})") from error


_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _decode_int(body: Json, _: object) -> int:
    if not isinstance(body, str) or not _DECIMAL.fullmatch(body):
        raise ValueError(f"expected decimal text of at most {_MAX_DIGITS} digits")
    return int(body)


def _decode_tuple(body: Json, inner: Callable[[Json], object]) -> tuple[object, ...]:
    if not isinstance(body, list):
        raise ValueError("expected a list")
    return tuple(inner(item) for item in body)


_DECODERS: dict[str, Callable[[Json, Callable[[Json], Any]], object]] = {
    "$float": lambda body, _: _FLOATS[body],
    "$int": _decode_int,
    "$tuple": _decode_tuple,
    "$bytes": lambda body, _: base64.b64decode(body, validate=True),
    "$dict": lambda body, inner: {inner(key): inner(item) for key, item in body},
}
