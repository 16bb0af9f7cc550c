"""A table of numpy columns as bytes: a small JSON header, then the columns end to end.

magic (8 bytes) · header length (u64, little-endian) · header, padded with spaces so that the
columns begin at a multiple of 64 · columns, little-endian, wide elements first
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.strict_json import load_strict
from dcp_resume.manifest.values import Json
from dcp_resume.problems import summarise

__all__ = ["Columns", "Schema", "pack_columns", "unpack_columns"]

Columns: TypeAlias = Mapping[str, npt.NDArray[Any]]
Schema: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Column → element type (``u1`` … ``i8``) and the shape behind the first dimension."""

ELEMENT_TYPES = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"})
MAX_HEADER = 2**20
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
    problems: list[Problem] = []
    view = memoryview(data)
    header, begin = _read_header(magic, view, where, problems)
    places: dict[str, tuple[int, str, tuple[int, ...]]] = {}
    position = begin
    for number, entry in enumerate(header.get("columns", ())):
        try:
            name, dtype, shape = _read_entry(entry, schema)
            if name in places:
                raise ValueError(f"column {name} occurs twice")
            places[name] = (position, dtype, shape)
            position += math.prod(shape) * int(dtype[1])
        except (TypeError, ValueError) as error:
            problems.append(Problem(f"{where}.columns[{number}]", "column", str(error)))
    if not problems:
        missing = sorted(set(schema) - set(places))
        problems += [Problem(f"{where}.{name}", "missing", "no such column") for name in missing]
        if position != len(view):
            message = f"columns end at {position}, the table at {len(view)}"
            problems.append(Problem(where, "size", message))
    if problems:
        message = f"{where} is no valid table of columns:\n{summarise(problems)}"
        raise InvalidDocument(message, problems=tuple(problems))
    columns = {
        name: np.frombuffer(view, f"<{dtype}", math.prod(shape), offset).reshape(shape)
        for name, (offset, dtype, shape) in places.items()
    }
    for column in columns.values():
        column.flags.writeable = False
    return header["meta"], columns


def _read_header(
    magic: bytes, view: memoryview, where: str, problems: list[Problem]
) -> tuple[dict[str, Any], int]:
    try:
        found = bytes(view[:MAGIC_BYTES])
        length = int.from_bytes(view[MAGIC_BYTES:PREFIX_BYTES], "little")
        begin = PREFIX_BYTES + length
        if found != magic:
            raise ValueError(f"expected the magic {magic!r}, found {found!r}")
        if length > MAX_HEADER or begin > len(view) or begin % ALIGNMENT:
            raise ValueError(f"a header of {length} bytes does not fit into {len(view)}")
        header = load_strict(bytes(view[PREFIX_BYTES:begin]))
        if not isinstance(header, dict) or set(header) != {"columns", "meta"}:
            raise ValueError("expected an object of columns and meta")
        if not isinstance(header["columns"], list) or not isinstance(header["meta"], dict):
            raise ValueError("expected a list of columns and an object of meta")
    except ValueError as error:
        problems.append(Problem(where, "header", str(error)))
        return {}, 0
    return header, begin


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
