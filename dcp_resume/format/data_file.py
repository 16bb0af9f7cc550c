"""The header of a data file.

A data file is a valid safetensors file: eight bytes of header length, a JSON header padded with
spaces so that data begins at a multiple of 64, then the chunks end to end. The metadata
``DCP_SHARDING_INFO`` says where each chunk lies in its tensor, as torch's own
HuggingFaceStorageWriter does, so that stock ``dcp.load`` reads our files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.dtypes import DTYPES, RESERVED_KEY
from dcp_resume.format.strict_json import load_strict
from dcp_resume.manifest.values import Json
from dcp_resume.problems import summarise

__all__ = ["ChunkHeader", "header_bytes", "parse_header"]

MAX_HEADER = 100_000_000
"""Longest JSON header that safetensors readers accept."""
ALIGNMENT = 64
LENGTH_BYTES = 8

_BY_CODE = {
    info.safetensors_name: info.name
    for info in DTYPES.values()
    if info.safetensors_name is not None
}


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What a file's header says of one chunk."""

    key: str
    """Key in the file: the FQN, or ``<fqn>#<n>`` in ``.part`` files."""
    dtype: str
    """Name in torch, without the prefix."""
    sizes: tuple[int, ...]
    """Elements per dimension."""
    offsets: tuple[int, ...]
    """Position in the whole tensor, in elements per dimension."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the chunk's data."""
        return math.prod(self.sizes) * DTYPES[self.dtype].itemsize


def header_bytes(chunks: Sequence[ChunkHeader]) -> bytes:
    """The bytes of a file before its first chunk.

    Args:
        chunks: In the order of their bytes. A dtype without a safetensors code is written as
            ``U8`` with its element's bytes as a last dimension, and named in the sharding info.

    Returns:
        The length, then the header; a multiple of 64 bytes.

    Raises:
        ValueError: Two chunks share a key, a key is ``__metadata__`` or no valid Unicode, or the
            header is longer than safetensors readers accept.
    """
    entries: dict[str, Any] = {}
    sharding: dict[str, Any] = {}
    begin = 0
    for chunk in chunks:
        if chunk.key in entries or chunk.key == RESERVED_KEY:
            raise ValueError(f"a data file cannot hold the key {chunk.key!r} (again)")
        info = DTYPES[chunk.dtype]
        sizes, offsets = list(chunk.sizes), list(chunk.offsets)
        where: dict[str, Any] = {"saved_offsets": offsets}
        if info.safetensors_name is None:
            sizes.append(info.itemsize)
            offsets.append(0)
            where["dtype"] = info.name
        end = begin + chunk.num_bytes
        code = info.safetensors_name or "U8"
        entries[chunk.key] = {"dtype": code, "shape": sizes, "data_offsets": [begin, end]}
        sharding[chunk.key] = where
        begin = end
    metadata = {"DCP_SHARDING_INFO": _dump(sharding), "DCP_VERSION": "1.0", "format": "pt"}
    text = _dump({RESERVED_KEY: metadata, **entries}).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise ValueError(f"a header holds at most {MAX_HEADER} bytes, found {len(text)}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def parse_header(data: bytes | memoryview, where: str) -> list[ChunkHeader]:
    """Read back what ``header_bytes`` wrote, trusting nothing.

    Args:
        data: Exactly the bytes before the first chunk.
        where: Key of the file, for messages.

    Returns:
        The chunks in the order of their bytes.

    Raises:
        InvalidDocument: With every problem found: lengths, JSON, unknown dtypes, shapes, gaps or
            overlaps of data, sharding info that does not name exactly the chunks.
    """
    problems: list[Problem] = []
    document = _read_document(bytes(data), where, problems)
    metadata = document.pop(RESERVED_KEY, None)
    sharding = _read_sharding(metadata, where, problems)
    spans: list[tuple[int, int, ChunkHeader]] = []
    for key, entry in document.items():
        try:
            spans.append(_read_entry(key, entry, sharding.pop(key, None)))
        except (TypeError, ValueError, KeyError) as error:
            problems.append(Problem(f"{where}[{key}]", "header", f"malformed entry ({error!r})"))
    problems += [Problem(f"{where}[{key}]", "header", "named without data") for key in sharding]
    spans.sort(key=lambda span: span[:2])
    position = 0
    for begin, end, chunk in spans:
        if begin != position:
            message = f"data begins at {begin}, expected {position}"
            problems.append(Problem(f"{where}[{chunk.key}]", "overlap_or_gap", message))
        position = end
    if problems:
        message = f"{where} is not a data file of ours:\n{summarise(problems)}"
        raise InvalidDocument(message, problems=tuple(problems))
    return [chunk for _, _, chunk in spans]


def _read_document(data: bytes, where: str, problems: list[Problem]) -> dict[str, Any]:
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or length != len(data) - LENGTH_BYTES or length > MAX_HEADER:
        message = f"the header claims {length} bytes, {len(data)} bytes are at hand with its length"
        problems.append(Problem(where, "length", message))
        return {}
    if len(data) % ALIGNMENT:
        message = f"data begins at {len(data)}, no multiple of {ALIGNMENT}"
        problems.append(Problem(where, "alignment", message))
    try:
        document = load_strict(data[LENGTH_BYTES:])
    except ValueError as error:
        problems.append(Problem(where, "json", str(error)))
        return {}
    if not isinstance(document, dict):
        problems.append(Problem(where, "json", "expected an object"))
        return {}
    return document


def _read_sharding(metadata: object, where: str, problems: list[Problem]) -> dict[str, Any]:
    try:
        if not isinstance(metadata, dict):
            raise ValueError("expected an object")
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("expected strings as values")
        sharding = load_strict(metadata["DCP_SHARDING_INFO"].encode())
        if metadata.get("DCP_VERSION") != "1.0" or not isinstance(sharding, dict):
            raise ValueError("expected DCP_VERSION 1.0 and an object as DCP_SHARDING_INFO")
    except (ValueError, KeyError) as error:
        message = f"malformed metadata ({error!r})"
        problems.append(Problem(f"{where}[{RESERVED_KEY}]", "header", message))
        return {}
    return sharding


def _extent(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError("expected a list of at most 64 numbers")
    if not all(type(item) is int and 0 <= item < 2**63 for item in value):
        raise ValueError("expected numbers from 0 to 2^63 - 1")
    return tuple(value)


def _read_entry(key: str, entry: Json, sharding: Json) -> tuple[int, int, ChunkHeader]:
    if set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets, found {sorted(entry)}")
    if not isinstance(sharding, dict) or not {"saved_offsets"} <= set(sharding):
        raise ValueError("no saved_offsets in DCP_SHARDING_INFO")
    sizes, offsets = _extent(entry["shape"]), _extent(sharding["saved_offsets"])
    begin, end = _extent(entry["data_offsets"])
    dtype = _BY_CODE[entry["dtype"]]
    if "dtype" in sharding:
        info = DTYPES[sharding["dtype"]]
        if info.safetensors_name is not None or dtype != "uint8":
            raise ValueError(f"{info.name} is not stored as bytes")
        if sizes[-1:] != (info.itemsize,) or offsets[-1:] != (0,):
            raise ValueError(f"expected a last dimension of {info.itemsize} bytes")
        dtype, sizes, offsets = info.name, sizes[:-1], offsets[:-1]
    if len(sizes) != len(offsets):
        raise ValueError(f"shape {sizes} and offsets {offsets} differ in length")
    chunk = ChunkHeader(key, dtype, sizes, offsets)
    if end - begin != chunk.num_bytes:
        raise ValueError(f"expected {chunk.num_bytes} bytes, found {end - begin}")
    return begin, end, chunk
