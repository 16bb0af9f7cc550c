"""Prove stored tensors as wholes: recompute every recorded digest from the data files."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.planning.box_rows import unpad_box
from dcp_resume.planning.padding import logical_shape
from dcp_resume.session.box_digests import digest_row_major
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.reading import read_targets
from dcp_resume.session.tensor_digests import differing, recorded_digest
from dcp_resume.session.windows import StoredBox, cut_windows
from dcp_resume.storage import ObjectStore

__all__ = ["prove_stored_tensors"]

WINDOW_BYTES = 32 * 1024 * 1024


def prove_stored_tensors(
    store: ObjectStore, opened: OpenedCheckpoint, advance: Callable[[int], None]
) -> tuple[int, list[Problem]]:
    """Read every tensor with a recorded digest, verified, and digest it anew.

    Memory is bounded by a window and the readers, whatever the size of a tensor.

    Args:
        store: Holds the checkpoint.
        opened: Its documents.
        advance: Called with the bytes of each window that was digested.

    Returns:
        How many tensors were digested, and every problem: of kind ``tensor_digest``, or the first
        ones met in reading, which end the proof.

    Raises:
        StorageError: The store failed.
    """
    tensors = opened.catalog.tensors
    totals = {
        number: PositionDigest()
        for number, entry in enumerate(tensors)
        if recorded_digest(entry) is not None
    }
    boxes = (box for number in totals for box in _stored_boxes(opened, number))
    for window in cut_windows(boxes, np.empty(WINDOW_BYTES, np.uint8).data):
        problems = read_targets(store, opened, window.targets).problems
        if problems:
            return 0, problems
        for target in window.targets:
            number = opened.tensor_ids[target.fqn]
            entry = tensors[number]
            totals[number] += digest_row_major(
                target.memory, ITEMSIZES[entry.dtype], target.box, logical_shape(entry)
            )
        advance(window.num_bytes)
    found = ((tensors[number], total) for number, total in totals.items())
    return len(totals), list(differing(found))


def _stored_boxes(opened: OpenedCheckpoint, tensor: int) -> list[StoredBox]:
    """The chunks of one tensor of the catalog, as boxes."""
    index, entry = opened.index, opened.catalog.tensors[tensor]
    ndim = len(entry.global_shape)
    codes = index.chunk_box[index.chunks_of(tensor)].tolist()
    return [
        StoredBox(
            entry.fqn,
            unpad_box(index.box_offsets[code], index.box_sizes[code], ndim),
            ITEMSIZES[entry.dtype],
        )
        for code in codes
    ]
