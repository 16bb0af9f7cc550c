"""Documents to bytes and back. Every document is hostile until it has passed through here.

Bytes are deterministic: UTF-8, keys sorted, a newline at the end, no NaN or Infinity. Digests are
always over the exact bytes found, so a reader never has to reproduce them. Manifests and log
records end with a checksum of their own (``seals.py``).
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from dcp_resume.errors import InvalidDocument, Problem, UnsupportedFormat
from dcp_resume.manifest.models import (
    FORMAT_MAJOR,
    FORMAT_NAME,
    KNOWN_FEATURES,
    Catalog,
    Manifest,
)
from dcp_resume.manifest.records import LogRecord, log_record_adapter
from dcp_resume.manifest.seals import (
    SEAL_FIELDS,
    Signature,
    find_seal,
    not_signed,
    seal,
)
from dcp_resume.manifest.values import Json
from dcp_resume.problems import summarise

__all__ = [
    "MAX_CATALOG_BYTES",
    "MAX_INDEX_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_RECORD_BYTES",
    "decode_catalog",
    "decode_manifest",
    "decode_record",
    "encode",
]

MAX_MANIFEST_BYTES = 256 * 2**10
MAX_RECORD_BYTES = 64 * 2**10
MAX_CATALOG_BYTES = 512 * 2**20
MAX_INDEX_BYTES = 2**30
"""A hundred million chunks; a sparse file of any size costs its writer nothing."""
MAX_DEPTH = 128
"""JSON levels. Far below what overflows a parser's stack: some stop at 200."""

_T = TypeVar("_T")
_manifest_adapter: TypeAdapter[Manifest] = TypeAdapter(Manifest)
_catalog_adapter: TypeAdapter[Catalog] = TypeAdapter(Catalog)
_MAYBE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def encode(
    document: Manifest | Catalog | LogRecord,
    sign: Callable[[bytes], Signature | None] = not_signed,
) -> bytes:
    """The bytes of a document: a manifest is indented for people, the others are one line.

    Args:
        document: What to write.
        sign: Signs a manifest or a log record.

    Raises:
        InvalidDocument: The document is larger than readers accept, or holds a value that JSON
            cannot say (an untagged NaN, a lone surrogate, a foreign type) in an unknown field.
    """
    where, cap = type(document).__name__, MAX_RECORD_BYTES
    if isinstance(document, Manifest):
        cap = MAX_MANIFEST_BYTES
    elif isinstance(document, Catalog):
        cap = MAX_CATALOG_BYTES
    is_for_people = isinstance(document, Manifest)
    try:
        fields = document.model_dump(mode="python")
        # A reader refuses what is deeper, or names a field twice, so it must not be written.
        _check_depth(fields)
        if fields.keys() & SEAL_FIELDS:
            raise ValueError(f"{sorted(SEAL_FIELDS)} are written by the seal alone")
        text = json.dumps(
            fields,
            allow_nan=False,
            ensure_ascii=False,
            sort_keys=True,
            indent=2 if is_for_people else None,
            separators=(",", ": " if is_for_people else ":"),
        )
        data = text.encode("utf-8") + b"\n"
        if not isinstance(document, Catalog):
            data = seal(data, sign)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(where, [Problem(where, "not_json", str(error))], "write") from error
    _check_size(data, where, cap, "write")
    return data


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest.

    Args:
        data: Exact bytes as found.
        where: Key they were found under, for messages.

    Raises:
        UnsupportedFormat: Another format, a newer major version, or an unknown required feature.
        InvalidDocument: Malformed; every fault is listed.
    """
    return _decode_sealed(data, where, MAX_MANIFEST_BYTES, _manifest_adapter)


def decode_catalog(data: bytes, where: str) -> Catalog:
    """Read a catalog; arguments and errors as of ``decode_manifest``.

    Raises:
        UnsupportedFormat: Another format, a newer major version, or an unknown required feature.
        InvalidDocument: Malformed; every fault is listed.
    """
    return _decode(data, where, MAX_CATALOG_BYTES, _catalog_adapter)


def decode_record(data: bytes, where: str) -> LogRecord:
    """Read a log record; arguments and errors as of ``decode_manifest``.

    Raises:
        UnsupportedFormat: Another format, a newer major version, or an unknown required feature.
        InvalidDocument: Malformed; every fault is listed.
    """
    record: LogRecord = _decode_sealed(data, where, MAX_RECORD_BYTES, log_record_adapter)
    return record


def _decode_sealed(data: bytes, where: str, cap: int, adapter: TypeAdapter[_T]) -> _T:
    _check_size(data, where, cap, "read")
    found = find_seal(data)
    if found is None:
        # Another format need not end as ours does, so say that first, where it is so.
        _check_format(_parse(data, where), where)
        message = "expected a checksum as its last line, found none"
        raise _invalid(where, [Problem(where, "checksum", message)])
    if not found.is_whole:
        message = f"it says checksum {found.checksum}, its bytes have {found.expected}"
        raise _invalid(where, [Problem(where, "checksum", message)])
    return _decode(found.content, where, cap, adapter)


def _decode(data: bytes, where: str, cap: int, adapter: TypeAdapter[_T]) -> _T:
    _check_size(data, where, cap, "read")
    _check_format(_parse(data, where), where)
    try:
        # From the bytes again: only in JSON mode do strict models take an array for a tuple.
        return adapter.validate_json(data)
    except ValidationError as error:
        is_record = adapter is log_record_adapter
        problems = [_problem(fault, where, is_record) for fault in error.errors(include_url=False)]
        raise _invalid(where, problems) from error


def _check_size(data: bytes, where: str, cap: int, verb: str) -> None:
    if len(data) > cap:
        message = f"expected at most {cap} bytes, found {len(data)}"
        raise _invalid(where, [Problem(where, "too_large", message)], verb)


def _parse(data: bytes, where: str) -> Json:
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if _MAYBE_SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise _invalid(where, [Problem(where, "not_json", f"{error}")]) from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        # Parsers disagree on which one counts, so two readers would see two documents.
        raise ValueError(f"an object names {', '.join(map(repr, twice[:5]))} more than once")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; expected a tagged float")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is beyond the range of a float")
    return number


def _check_depth(value: Json) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list, tuple))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _check_format(value: Json, where: str) -> None:
    mark = value.get("format") if isinstance(value, dict) else None
    if not isinstance(mark, dict):
        message = "expected an object with a `format` mark; this is no document of dcp_resume"
        raise _invalid(where, [Problem(f"{where}:format", "missing", message)])
    problems = list(_format_problems(mark, where))
    if problems:
        raise UnsupportedFormat(
            f"cannot read {where}: it was written by another or a newer format.\n"
            f"{summarise(problems)}\nRead it with a dcp_resume that knows this format.",
            problems=tuple(problems),
        )


def _format_problems(mark: dict[str, Any], where: str) -> Sequence[Problem]:
    def problem(field: str, kind: str, message: str) -> Problem:
        return Problem(f"{where}:format.{field}", kind, message)

    name, major, requires = mark.get("name"), mark.get("major"), mark.get("requires", [])
    problems = []
    if name != FORMAT_NAME:
        problems.append(problem("name", "format", f"expected {FORMAT_NAME!r}, found {name!r:.80}"))
    if type(major) is not int or major != FORMAT_MAJOR:
        message = f"this reader knows {FORMAT_MAJOR}, found {major!r:.80}"
        problems.append(problem("major", "major", message))
    if isinstance(requires, list):
        features = {feature for feature in requires if isinstance(feature, str)}
        problems += [
            problem("requires", "feature", f"needs {feature!r:.80}, which this reader lacks")
            for feature in sorted(features - KNOWN_FEATURES)
        ]
    return problems


def _problem(fault: ErrorDetails, where: str, is_record: bool) -> Problem:
    # The first place of a record's fault is its kind, which is no field of the document.
    places = fault["loc"][1:] if is_record else fault["loc"]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in places).lstrip(".")
    found = "" if fault["type"] == "missing" else f", found {reprlib.repr(fault['input'])}"
    return Problem(f"{where}:{path}" if path else where, fault["type"], f"{fault['msg']}{found}")


def _invalid(where: str, problems: Sequence[Problem], verb: str = "read") -> InvalidDocument:
    return InvalidDocument(
        f"cannot {verb} {where}: the document is malformed.\n{summarise(problems)}\n"
        "Use another checkpoint, or restore the file from a copy.",
        problems=tuple(problems),
    )
