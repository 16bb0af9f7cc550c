"""A data file that was rewritten with every block digest right: only a tensor digest finds it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dcp_resume.format.digests import digest_blocks, fold
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.storage import open_store
from tests.support.damage import NEWER, DamagedRun

__all__ = ["FORGED_STEP", "flip_element", "opened_at"]

FORGED_STEP = NEWER
"""The step whose documents can be rewritten."""


class _SavedRun(DamagedRun):
    """A run that a test saved itself."""

    def __init__(self, root: Path) -> None:
        self.root = root


def opened_at(root: Path) -> OpenedCheckpoint:
    """The newest checkpoint."""
    store = open_store(str(root))
    (located,) = find_checkpoints(store, "latest")
    return open_checkpoint(store, located.prefix, located.manifest)


def flip_element(root: Path, fqn: str) -> None:
    """Invert one bit of the first element of a tensor's last chunk that is not empty."""
    opened = opened_at(root)
    index, tensor = opened.index, opened.tensor_ids[fqn]
    volumes = index.box_sizes[index.chunk_box].prod(axis=1)
    chunk = [int(c) for c in index.chunks_of(tensor) if volumes[c]][-1]
    file = int(index.chunk_file[chunk])
    path = root / opened.file_key(file)
    data = bytearray(path.read_bytes())
    data[int(opened.begins[chunk])] ^= 1
    path.write_bytes(data)

    bounds = opened.block_bounds(file)
    digests = digest_blocks(bounds, [memoryview(data)])
    first = int(opened.blocks.first[file])
    blocks = index.block_digest.copy()
    blocks[first : first + len(bounds) - 1] = np.frombuffer(digests, np.uint8).reshape(-1, 16)

    def edit(catalog: Any) -> None:
        catalog["files"][file]["digest"] = fold(digests)

    run = _SavedRun(root)
    run.edit_index(lambda old: dataclasses.replace(old, block_digest=blocks))
    run.edit_catalog(edit)
