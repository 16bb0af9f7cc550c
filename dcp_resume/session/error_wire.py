"""Errors as JSON: they travel between ranks with type and facts, and without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dcp_resume import errors
from dcp_resume.errors import DcpResumeError, Problem

__all__ = ["decode_error", "describe_error", "encode_error"]


def describe_error(error: BaseException) -> str:
    """``Type: message`` of any exception, the form ``RankErrors`` carries."""
    return f"{type(error).__name__}: {error}"


def _to_json(value: object) -> Any:
    if isinstance(value, Problem):
        return {"$problem": [value.where, value.kind, value.message]}
    if isinstance(value, tuple):
        return {"$tuple": [_to_json(item) for item in value]}
    if isinstance(value, Mapping):
        return {"$map": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    return value


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "$problem" in value:
        return Problem(*value["$problem"])
    if "$tuple" in value:
        return tuple(_from_json(item) for item in value["$tuple"])
    return {_from_json(key): _from_json(item) for key, item in value["$map"]}


def encode_error(error: DcpResumeError) -> Any:
    """One of our errors as a JSON value."""
    facts = {name: _to_json(getattr(error, name)) for name in error.fact_names()}
    json.dumps(facts)  # a fact that cannot travel is a bug here, not on the other rank
    return {"type": type(error).__name__, "message": error.message, "facts": facts}


def decode_error(document: Any) -> DcpResumeError:
    """Read what ``encode_error`` wrote.

    Raises:
        KeyError: The document names no error class of ours.
    """
    name = document["type"]
    if name not in errors.__all__:
        raise KeyError(name)
    facts = {key: _from_json(value) for key, value in document["facts"].items()}
    error = getattr(errors, name)(document["message"], **facts)
    assert isinstance(error, DcpResumeError)
    return error
