"""What a hostile writer can hand to a reader, one entry point a kind of document.

Each target takes any bytes. It may return or raise an error of ours; anything else is a finding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from dcp_resume import (
    CheckpointManager,
    Declarations,
    RngState,
    SaveMode,
    Settings,
    TrainerState,
)
from dcp_resume.errors import DcpResumeError
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.data_file import parse_header
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.index_check import check_index
from dcp_resume.format.leaves import decode_leaf, unpack_leaves
from dcp_resume.manifest.checks import catalog_problems, manifest_problems
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.models import Catalog, Manifest
from dcp_resume.manifest.seals import find_seal, seal
from dcp_resume.manifest.wire import decode_catalog, decode_manifest, decode_record, encode
from tests.fuzz.foreign import FOREIGN
from tests.support.damage import NEWER, OLDER

__all__ = [
    "TARGETS",
    "Documents",
    "Target",
    "documents",
    "make_run",
    "objects_at",
    "state_at",
    "unsealed",
]


class Documents(NamedTuple):
    """The bytes of a small run, by kind; records and manifest without their seals."""

    records: tuple[bytes, ...]
    manifest: bytes
    catalog: bytes
    chunk_index: bytes
    headers: tuple[bytes, ...]
    leaves: tuple[bytes, ...]


class Target(NamedTuple):
    """One entry point."""

    feed: Callable[[bytes], None]
    seeds: Callable[[], tuple[bytes, ...]]
    """Well-formed inputs to begin from."""


def objects_at(step: int) -> dict[str, object]:
    """The state of a trainer: objects, whose own code meets what a document says too."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    trainer = TrainerState()
    trainer.advance(step=step, samples=1, loss=1.0, last_lr=[0.1])
    objects = {"net": model, "optim": optimizer, "trainer": trainer, "random": RngState()}
    return {**state_at(step), **objects}


def state_at(step: int) -> dict[str, object]:
    """Tensors and values with most of what a catalog can say."""
    return {
        "model": {
            "w": torch.arange(60.0).reshape(6, 10) + step,
            "b": torch.ones(3, dtype=torch.bfloat16),
            "z": torch.zeros(2, dtype=torch.complex128),
            "none": torch.empty(0, 4),
        },
        "data": {"epoch": step, "seen": {1: (2, None)}, "note": "größe"},
        "rng": {"state": [step, 2, 3]},
    }


def make_run(root: Path) -> None:
    """Save two steps into a directory."""
    declarations = Declarations(per_rank=("rng.*",))
    settings = Settings(mode=SaveMode.BLOCKING, declarations=declarations)
    with CheckpointManager(root, settings) as checkpoints:
        for step in (OLDER, NEWER):
            checkpoints.save(step, objects_at(step))


def unsealed(path: Path) -> bytes:
    """A document without its seal, so that what is made of it can be sealed again."""
    found = find_seal(path.read_bytes())
    assert found is not None
    return found.content


@cache
def documents() -> Documents:
    """The documents of such a run."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_run(root)
        (attempt,) = (root / f"step-{NEWER:08}").iterdir()
        files = [path.read_bytes() for path in sorted(attempt.glob("shard-*"))]
        lengths = [8 + int.from_bytes(data[:8], "little") for data in files]
        return Documents(
            tuple(unsealed(path) for path in sorted((root / "log").iterdir())),
            unsealed(attempt / "manifest.json"),
            (attempt / "catalog.json").read_bytes(),
            (attempt / "chunk-index").read_bytes(),
            tuple(data[:length] for data, length in zip(files, lengths, strict=True)),
            tuple(data[data.index(b'{"leaves"') :] for data in files if b'{"leaves"' in data),
        )


@cache
def _manifest() -> Manifest:
    return decode_manifest(seal(documents().manifest), "manifest.json")


@cache
def _catalog() -> Catalog:
    return decode_catalog(documents().catalog, "catalog.json")


def _log_record(data: bytes) -> None:
    record = decode_record(seal(data), "log/000000000001.json")
    decode_record(encode(record), "again")
    history = RunHistory().extend([(1, record)])
    list(history.lineage())


def _log_behind_others(data: bytes) -> None:
    others = [decode_record(seal(record), "log") for record in documents().records]
    history = RunHistory().extend(enumerate(others, 1))
    record = decode_record(seal(data), "log").model_copy(update={"run": history.run})
    list(history.apply(len(others) + 1, record).lineage())


def _read_manifest(data: bytes) -> None:
    manifest = decode_manifest(seal(data), "manifest.json")
    list(manifest_problems(manifest))
    list(catalog_problems(manifest, _catalog(), ITEMSIZES))
    encode(manifest)


def _read_catalog(data: bytes) -> None:
    catalog = decode_catalog(data, "catalog.json")
    if list(catalog_problems(_manifest(), catalog, ITEMSIZES)):
        return
    check_index(ChunkIndex.from_bytes(documents().chunk_index, "i"), catalog, _manifest())


def _read_index(data: bytes) -> None:
    check_index(ChunkIndex.from_bytes(data, "chunk-index"), _catalog(), _manifest())


def _read_header(data: bytes) -> None:
    parse_header(data, "shard")


def _read_leaves(data: bytes) -> None:
    for fqn, (_, value) in unpack_leaves(data, "leaves").items():
        decode_leaf(value, fqn)


def _raw(data: bytes) -> None:
    """Bytes as they come, without a seal that fits."""
    for decode in (decode_record, decode_manifest, decode_catalog):
        try:
            decode(data, "raw")
        except DcpResumeError:
            continue


TARGETS: dict[str, Target] = {
    "log-record": Target(_log_record, lambda: documents().records),
    "log-behind-others": Target(_log_behind_others, lambda: documents().records),
    "manifest": Target(_read_manifest, lambda: (documents().manifest,)),
    "catalog": Target(_read_catalog, lambda: (documents().catalog,)),
    "chunk-index": Target(_read_index, lambda: (documents().chunk_index,)),
    "data-header": Target(_read_header, lambda: documents().headers),
    "leaves": Target(_read_leaves, lambda: documents().leaves),
    "raw": Target(_raw, lambda: (*documents().records, documents().manifest)),
    **{name: Target(feed, seeds) for name, (feed, seeds) in FOREIGN.items()},
}
