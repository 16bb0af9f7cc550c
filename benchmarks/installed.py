"""Which libraries can take part here."""

from __future__ import annotations

from importlib.util import find_spec

from benchmarks.bucket_contenders import BUCKET_CONTENDERS
from benchmarks.contenders import CONTENDERS

__all__ = ["LIBRARIES", "missing"]

LIBRARIES = tuple(dict.fromkeys((*CONTENDERS, *BUCKET_CONTENDERS)))
_NEEDS = {
    "torchsnapshot": "torchsnapshot",
    "bytecheckpoint": "bytecheckpoint",
    "megatron-core": "megatron",
    "dcp + s3torchconnector": "s3torchconnector",
}


def missing(library: str) -> str:
    """The package that a library needs and that is not installed; empty if nothing is missing."""
    package = _NEEDS.get(library, "")
    return package if package and find_spec(package) is None else ""
