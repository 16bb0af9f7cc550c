"""A table of numpy columns as bytes: a small JSON header, then the columns end to end.

magic (8 bytes) · header length (u64, little-endian) · header, padded with spaces so that the
columns begin at a multiple of 64 · columns, little-endian, wide elements first
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.strict_json import load_strict
from dcp_resume.manifest.values import Json
from dcp_resume.problems import summarise

__all__ = ["Columns", "Schema", "pack_columns", "unpack_columns"]

Columns: TypeAlias = Mapping[str, npt.NDArray[Any]]
_Type: TypeAlias = tuple[str, tuple[int, ...]]
Schema: TypeAlias = Mapping[str, _Type]
"""Column → element type (``u1`` … ``i8``) and the shape behind the first dimension."""

ELEMENT_TYPES = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"})
MAX_HEADER = 2**20
MAX_KNOWN = 2**12
"""Bytes of a header that is remembered: it is all that a hostile table can leave behind."""
ALIGNMENT = 64
MAGIC_BYTES = 8
PREFIX_BYTES = 16
_ENTRY_FIELDS = {"name", "dtype", "shape"}


def _type_name(column: npt.NDArray[Any]) -> str:
    name = f"{column.dtype.kind}{column.dtype.itemsize}"
    if name not in ELEMENT_TYPES:
        raise ValueError(f"a column holds integers, found {column.dtype}")
    return name


def pack_columns(magic: bytes, columns: Columns, meta: Mapping[str, Json]) -> bytes:
    """Lay columns out as bytes; equal columns and meta give equal bytes.

    Args:
        magic: 8 bytes that name the kind of table.
        columns: Integer arrays of any shape with at least one dimension.
        meta: JSON beside the columns; with it the header holds at most 1 MiB.

    Raises:
        ValueError: A wrong magic, element type or number of dimensions, or too much meta.
    """
    if len(magic) != MAGIC_BYTES:
        raise ValueError(f"a magic has {MAGIC_BYTES} bytes, found {magic!r}")
    if any(column.ndim < 1 for column in columns.values()):
        raise ValueError("a column has at least one dimension")
    types = {name: _type_name(column) for name, column in columns.items()}
    # Wide elements first: every column is aligned to its element without gaps.
    names = sorted(columns, key=lambda name: (-columns[name].dtype.itemsize, name))
    entries = [
        {"name": name, "dtype": types[name], "shape": list(columns[name].shape)} for name in names
    ]
    document = {"columns": entries, "meta": dict(meta)}
    header = json.dumps(document, allow_nan=False, separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-(PREFIX_BYTES + len(header)) % ALIGNMENT)
    if len(header) > MAX_HEADER:
        raise ValueError(f"a header of columns holds at most {MAX_HEADER} bytes: {len(header)}")
    payload = [
        np.ascontiguousarray(columns[name].astype(f"<{types[name]}", copy=False)).data
        for name in names
    ]
    return b"".join([magic, len(header).to_bytes(8, "little"), header, *payload])


def unpack_columns(
    magic: bytes, data: bytes | memoryview, where: str, schema: Schema
) -> tuple[dict[str, Json], dict[str, npt.NDArray[Any]]]:
    """Read a table back, trusting nothing; columns are read-only views of ``data``.

    Args:
        magic: Expected first 8 bytes.
        data: The whole table.
        where: Its key, for messages.
        schema: Exactly the columns to expect.

    Returns:
        The meta and the columns.

    Raises:
        InvalidDocument: With every problem found. Nothing is allocated beyond the header before
            all lengths are proved to add up to the size of ``data``.
    """
    view = memoryview(data).toreadonly()
    begin, header = _find_header(magic, view, where)
    read = _known_layout if len(header) <= MAX_KNOWN else _read_layout
    layout = read(header, tuple(schema.items()))
    problems = [Problem(where + place, kind, message) for place, kind, message in layout.faults]
    if not problems and begin + layout.num_bytes != len(view):
        message = f"columns end at {begin + layout.num_bytes}, the table at {len(view)}"
        problems.append(Problem(where, "size", message))
    if problems:
        raise _invalid(where, problems)
    columns = {
        name: np.frombuffer(view, dtype, count, begin + offset).reshape(shape)
        for name, dtype, count, offset, shape in layout.places
    }
    return dict(layout.meta), columns


def _invalid(where: str, problems: Sequence[Problem]) -> InvalidDocument:
    message = f"{where} is no valid table of columns:\n{summarise(problems)}"
    return InvalidDocument(message, problems=tuple(problems))


def _find_header(magic: bytes, view: memoryview, where: str) -> tuple[int, bytes]:
    """Where the columns begin, and the header before them."""
    found = bytes(view[:MAGIC_BYTES])
    length = int.from_bytes(view[MAGIC_BYTES:PREFIX_BYTES], "little")
    begin = PREFIX_BYTES + length
    message = ""
    if found != magic:
        message = f"expected the magic {magic!r}, found {found!r}"
    elif length > MAX_HEADER or begin > len(view) or begin % ALIGNMENT:
        message = f"a header of {length} bytes does not fit into {len(view)}"
    if message:
        raise _invalid(where, [Problem(where, "header", message)])
    return begin, bytes(view[PREFIX_BYTES:begin])


@dataclass(frozen=True, slots=True)
class _Layout:
    """What a header says, and what is wrong with it."""

    meta: Mapping[str, Json]
    places: tuple[tuple[str, str, int, int, tuple[int, ...]], ...]
    """Name, element type, number of elements, position behind the header and shape of columns."""
    num_bytes: int
    """Of all columns."""
    faults: tuple[tuple[str, str, str], ...]
    """Place, kind and message of each."""


def _read_layout(header: bytes, schema: tuple[tuple[str, _Type], ...]) -> _Layout:
    try:
        document = load_strict(header)
        if not isinstance(document, dict) or set(document) != {"columns", "meta"}:
            raise ValueError("expected an object of columns and meta")
        if not isinstance(document["columns"], list) or not isinstance(document["meta"], dict):
            raise ValueError("expected a list of columns and an object of meta")
    except ValueError as error:
        return _Layout({}, (), 0, (("", "header", str(error)),))
    expected = dict(schema)
    faults: list[tuple[str, str, str]] = []
    places: dict[str, tuple[str, str, int, int, tuple[int, ...]]] = {}
    position = 0
    for number, entry in enumerate(document["columns"]):
        try:
            name, dtype, shape = _read_entry(entry, expected)
            if name in places:
                raise ValueError(f"column {name} occurs twice")
            count = math.prod(shape)
            places[name] = (name, f"<{dtype}", count, position, shape)
            position += count * int(dtype[1])
        except (TypeError, ValueError) as error:
            faults.append((f".columns[{number}]", "column", str(error)))
    missing = [] if faults else sorted(set(expected) - set(places))
    faults += [(f".{name}", "missing", "no such column") for name in missing]
    return _Layout(document["meta"], tuple(places.values()), position, tuple(faults))


_known_layout = lru_cache(maxsize=64)(_read_layout)
"""Thousands of ranks send tables whose headers are equal."""


def _read_entry(entry: Json, schema: Schema) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != _ENTRY_FIELDS:
        raise ValueError(f"expected an object of {sorted(_ENTRY_FIELDS)}")
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    if not isinstance(name, str) or name not in schema:
        raise ValueError(f"unexpected column {name!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError(f"column {name} has a malformed shape")
    expected_dtype, behind = schema[name]
    if dtype != expected_dtype or len(shape) != 1 + len(behind) or tuple(shape[1:]) != behind:
        message = f"expected {expected_dtype}[n, *{list(behind)}], found {dtype}{shape}"
        raise ValueError(f"column {name}: {message}")
    return name, dtype, tuple(shape)
