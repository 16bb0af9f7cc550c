"""A run with two checkpoints, ways to damage the newer one, and a disk that refuses."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.digests import digest_bytes, digest_hex
from dcp_resume.manifest.seals import seal

__all__ = [
    "NEWER",
    "NUM_PARTS",
    "OLDER",
    "DamagedRun",
    "changed_parts",
    "flip",
    "flips",
    "little_memory",
    "sealed",
    "small_files",
    "state_at",
]

OLDER, NEWER = 10, 20
NUM_PARTS = 12
"""Files, and so reads: more than the readers, so that some are done before the last one."""

Edit = Callable[[Any], Any]


def state_at(step: int) -> dict[str, Any]:
    """The state after a step: one tensor a part, and a value."""
    parts: dict[str, Any] = {
        f"p{n:02}": {"w": torch.arange(60.0).reshape(6, 10) + 100 * n + step}
        for n in range(NUM_PARTS)
    }
    return {**parts, "data": {"epoch": step, "path": [1, step]}}


def changed_parts(state: dict[str, Any], step: int) -> set[str]:
    """FQNs of tensors that are not those of ``step`` any more."""
    expected = state_at(step)
    names = (f"p{n:02}" for n in range(NUM_PARTS))
    return {f"{n}.w" for n in names if not torch.equal(state[n]["w"], expected[n]["w"])}


def _make_run(root: Path) -> None:
    with CheckpointManager(root, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        checkpoints.save(OLDER, state_at(OLDER))
        checkpoints.save(NEWER, state_at(NEWER))


class DamagedRun:
    """A directory with checkpoints of step 10 and 20, as ``make`` saves them."""

    def __init__(self, root: Path, make: Callable[[Path], None] = _make_run) -> None:
        self.root = root
        make(root)

    def attempt(self, step: int = NEWER) -> Path:
        """Directory of a checkpoint."""
        (directory,) = (self.root / f"step-{step:08}").iterdir()
        return directory

    def data_file(self, part: int, step: int = NEWER) -> Path:
        """The data file of a part."""
        (path,) = self.attempt(step).glob(f"shard-00001-p{part:02}-*.safetensors")
        return path

    def commit_record(self, step: int = NEWER) -> Path:
        """The log record that commits a step."""
        records = (self.root / "log").iterdir()
        (found,) = (path for path in records if json.loads(path.read_bytes()).get("step") == step)
        return found

    def edit_manifest(self, edit: Edit) -> None:
        """Change the manifest's document, in place, with every digest right."""
        path = self.attempt() / "manifest.json"
        document = json.loads(path.read_bytes())
        edit(document)
        path.write_bytes(sealed(document))
        self.edit_record(lambda record: record["manifest"].update(_reference(path)))

    def edit_record(self, edit: Edit) -> None:
        """Change the log record that commits the newer step, in place."""
        path = self.commit_record()
        record = json.loads(path.read_bytes())
        edit(record)
        path.write_bytes(sealed(record))

    def edit_catalog(self, edit: Edit) -> None:
        """Change the catalog's document, in place, with every digest right."""
        path = self.attempt() / "catalog.json"
        document = json.loads(path.read_bytes())
        edit(document)
        path.write_bytes(json.dumps(document).encode())
        self.edit_manifest(lambda manifest: manifest["catalog"].update(_reference(path)))

    def edit_index(self, edit: Callable[[ChunkIndex], ChunkIndex]) -> None:
        """Replace the chunk index, with every digest right."""
        path = self.attempt() / "chunk-index"
        self.write_index(edit(ChunkIndex.from_bytes(path.read_bytes(), "index")).to_bytes())

    def write_index(self, data: bytes) -> None:
        """Replace the bytes of the chunk index, with every digest right."""
        path = self.attempt() / "chunk-index"
        path.write_bytes(data)
        reference = {**_reference(path), "block_digests": [digest_bytes([data]).hex()]}
        self.edit_manifest(lambda manifest: manifest["chunk_index"].update(reference))


def sealed(document: dict[str, Any]) -> bytes:
    """The bytes of a manifest or log record, with a checksum that fits."""
    fields = {name: value for name, value in document.items() if name != "checksum"}
    return seal(json.dumps(fields).encode() + b"\n")


def flip(path: Path, position: int) -> None:
    """Invert one bit of one byte; negative positions count from the end."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def flips(path: Path, step: int) -> Iterator[int]:
    """Every ``step``-th byte of a file, flipped while it is yielded."""
    whole = path.read_bytes()
    for position in range(0, len(whole), step):
        flip(path, position)
        yield position
        path.write_bytes(whole)


@contextlib.contextmanager
def small_files(num_bytes: int, *, is_on: bool = True) -> Iterator[None]:
    """The operating system refuses larger files to this process: a disk that fails one rank."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes if is_on else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def little_memory(num_bytes: int = 1 << 30) -> Iterator[None]:
    """The operating system gives this process no more than so many bytes above what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _reference(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "digest": digest_hex(data)}
