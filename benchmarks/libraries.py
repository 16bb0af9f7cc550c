"""Every library by its name in the tables, and which of them can take part here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from benchmarks.bucket_contenders import BUCKET_CONTENDERS
from benchmarks.contenders import (
    Contender,
    HuggingFaceDcp,
    Ours,
    Safetensors,
    StockDcp,
    TorchSave,
    TunedDcp,
)
from benchmarks.peers import ByteCheckpoint, MegatronCore, TorchSnapshot

__all__ = ["CONTENDERS", "LIBRARIES", "missing"]

CONTENDERS: Mapping[str, type[Contender]] = {
    "dcp_resume": Ours,
    "dcp": StockDcp,
    "dcp tuned": TunedDcp,
    "dcp HuggingFace": HuggingFaceDcp,
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "torchsnapshot": TorchSnapshot,
    "bytecheckpoint": ByteCheckpoint,
    "megatron-core": MegatronCore,
}
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
