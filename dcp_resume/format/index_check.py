"""Proof that a chunk index describes exactly the tensors and files of its catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import Problem
from dcp_resume.format.box_table import MAX_TOTAL_BYTES, shape_fault
from dcp_resume.format.chunk_index import UNUSED, ChunkIndex
from dcp_resume.format.digests import DigestAlgorithm, fold
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.tiling import tiling_faults
from dcp_resume.manifest.models import Catalog, Manifest

__all__ = ["check_index"]

Int64s: TypeAlias = npt.NDArray[np.int64]

MAX_REPORTED = 50
"""Most problems of one kind that are spelled out."""


def check_index(index: ChunkIndex, catalog: Catalog, manifest: Manifest) -> list[Problem]:
    """Prove that an index describes exactly the tensors and files of the catalog.

    Five stages, each safe only after the one before: counts, ids, boxes, bytes and blocks, and
    that the chunks of each tensor cover it exactly once.

    Args:
        index: As read by ``from_bytes``.
        catalog: The catalog of the same checkpoint, digest proved.
        manifest: Its manifest.

    Returns:
        Every problem of the first stage that found any, with FQN, file key and chunk; empty if
        all is well.
    """
    check = _Check(index, catalog, manifest)
    for stage in (check.counts, check.ids, check.boxes, check.data, check.tiling):
        problems = stage()
        if problems:
            return problems
    return []


@dataclass(frozen=True)
class _Check:
    index: ChunkIndex
    catalog: Catalog
    manifest: Manifest

    def counts(self) -> list[Problem]:
        index, counts = self.index, self.manifest.counts
        pairs = {
            "tensors": (counts.tensors, len(self.catalog.tensors)),
            "files of the catalog": (counts.files, len(self.catalog.files)),
            "files": (counts.files, len(index.file_chunk_count)),
            "chunks": (counts.chunks, len(index.chunk_tensor)),
            "boxes": (counts.boxes, len(index.box_ndim)),
            "blocks": (counts.blocks, len(index.block_digest)),
        }
        return [
            Problem("chunk-index", "count", f"the manifest says {said} {name}, found {found}")
            for name, (said, found) in pairs.items()
            if said != found
        ]

    def ids(self) -> list[Problem]:
        index, tensors = self.index, self.catalog.tensors
        problems = [
            Problem(entry.fqn, "tensor", message)
            for entry in tensors
            if (message := shape_fault(entry.global_shape, ITEMSIZES.get(entry.dtype)))
        ]
        chunk_tensor = index.chunk_tensor
        is_alias = np.array([entry.kind == "alias" for entry in tensors] + [False])
        is_own = np.array([file.base == "self" for file in self.catalog.files], bool)
        is_unused = chunk_tensor == UNUSED
        unknown = (chunk_tensor >= len(tensors)) & ~is_unused
        aliased = is_alias[np.minimum(chunk_tensor, len(tensors))]
        wasted = is_unused & is_own[index.chunk_file]
        problems += self._report(unknown, "id", "has an unknown tensor id")
        problems += self._report(aliased, "alias", "belongs to an alias, which has no bytes")
        problems += self._report(wasted, "unused", "is unused in a file of our own")
        return problems

    def boxes(self) -> list[Problem]:
        index, row = self.index, np.minimum(self.index.chunk_tensor, len(self.catalog.tensors))
        shapes = [entry.global_shape for entry in self.catalog.tensors] + [(2**63 - 1,)]
        ndim = np.array([len(shape) for shape in shapes])
        unequal = index.box_ndim[index.chunk_box] != ndim[row]
        problems = self._report(unequal, "ndim", "has another number of dimensions")
        outside = np.zeros(len(row), bool)
        for dim in range(index.box_offsets.shape[1]):
            extent = np.array([shape[dim] if dim < len(shape) else 1 for shape in shapes])
            # By subtraction: the sum of a hostile offset and size would overflow.
            room = extent[row] - index.box_sizes[index.chunk_box, dim]
            outside |= (room < 0) | (index.box_offsets[index.chunk_box, dim] > room)
        return problems + self._report(outside & ~unequal, "bounds", "reaches out of its tensor")

    def data(self) -> list[Problem]:
        index, files = self.index, self.catalog.files
        sizes = np.array([file.size for file in files], np.int64)
        headers = np.array([file.header_bytes for file in files], np.int64)
        itemsizes = [ITEMSIZES[entry.dtype] for entry in self.catalog.tensors]
        claimed = np.append(np.asarray(itemsizes, float), 1.0)
        row = np.minimum(index.chunk_tensor, len(itemsizes))
        volume = np.prod(index.box_sizes, axis=1, dtype=np.float64)[index.chunk_box]
        if max((volume * claimed[row]).sum(), sizes.sum(dtype=float)) > MAX_TOTAL_BYTES:
            message = f"files or chunks of more than {MAX_TOTAL_BYTES} bytes in all"
            return [Problem("chunk-index", "size", message)]
        ends = np.append(0, np.cumsum(index.chunk_bytes(itemsizes)))
        held = np.diff(ends[index.file_first_chunk])
        problems = [
            Problem(
                files[f].key,
                "size",
                f"is {sizes[f]} bytes, chunks hold {held[f]} behind a header of {headers[f]}",
            )
            for f in np.flatnonzero(sizes - headers != held)[:MAX_REPORTED].tolist()
        ]
        return problems or self._block_digests(itemsizes, headers)

    def _block_digests(self, itemsizes: list[int], headers: Int64s) -> list[Problem]:
        index, files, digests = self.index, self.catalog.files, self.index.block_digest
        algorithm = DigestAlgorithm(self.manifest.digest.algorithm)
        block_size = self.manifest.digest.block_size
        total = sum(file.size for file in files)
        # Before the blocks are laid out, which allocates for each of them.
        if total > len(digests) * block_size:
            message = f"{len(digests)} blocks of {block_size} do not cover {total} bytes"
            return [Problem("chunk-index", "blocks", message)]
        first = index.blocks(itemsizes, headers, block_size).first
        if first[-1] != len(digests):
            message = f"expected digests of {first[-1]} blocks, found {len(digests)}"
            return [Problem("chunk-index", "blocks", message)]
        return [
            Problem(file.key, "digest", f"the catalog says {file.digest}, its blocks {found}")
            for f, file in enumerate(files)
            if (found := fold(digests[first[f] : first[f + 1]].tobytes(), algorithm)) != file.digest
        ][:MAX_REPORTED]

    def tiling(self) -> list[Problem]:
        index, tensors = self.index, self.catalog.tensors
        used = np.flatnonzero(index.chunk_tensor != UNUSED)
        faults = tiling_faults(
            index.chunk_tensor[used].astype(np.int64),
            index.chunk_box[used],
            index.box_offsets,
            index.box_sizes,
            [None if entry.kind == "alias" else entry.global_shape for entry in tensors],
        )
        return [
            Problem(
                tensors[fault.tensor].fqn,
                fault.kind,
                " and ".join([*(self._place(used[c]) for c in fault.chunks), fault.message]),
            )
            for fault in faults[:MAX_REPORTED]
        ]

    def _place(self, chunk: int) -> str:
        key = self.catalog.files[int(self.index.chunk_file[chunk])].key
        return f"chunk {chunk} (in {key})"

    def _report(self, is_wrong: npt.NDArray[np.bool_], kind: str, what: str) -> list[Problem]:
        chunks = np.flatnonzero(is_wrong)
        problems = [
            Problem(self._fqn(chunk), kind, f"{self._place(chunk)} {what}")
            for chunk in chunks[:MAX_REPORTED].tolist()
        ]
        if len(chunks) > MAX_REPORTED:
            more = f"{len(chunks) - MAX_REPORTED} more chunks: {what}"
            problems.append(Problem("chunk-index", kind, more))
        return problems

    def _fqn(self, chunk: int) -> str:
        tensor = int(self.index.chunk_tensor[chunk])
        known = self.catalog.tensors
        return known[tensor].fqn if tensor < len(known) else "chunk-index"
