"""Proof that a chunk index describes exactly the tensors and files of its catalog."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import Problem
from dcp_resume.format.box_table import MAX_TOTAL_BYTES
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.digests import DigestAlgorithm, fold
from dcp_resume.format.index_structure import MAX_REPORTED, IndexStructure
from dcp_resume.manifest.models import Catalog, Manifest

__all__ = ["check_index", "check_structure"]

Int64s: TypeAlias = npt.NDArray[np.int64]


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
    structure = IndexStructure(index, catalog.tensors, [file.key for file in catalog.files])
    return check_structure(structure, index.block_digest, catalog, manifest)


def check_structure(
    structure: IndexStructure,
    block_digest: npt.NDArray[np.uint8],
    catalog: Catalog,
    manifest: Manifest,
) -> list[Problem]:
    """Prove the same of an index that has a given structure, whose proof is kept with it.

    Args:
        structure: Of the tensors of the catalog, which may have digests there.
        block_digest: u8[N, 16].
        catalog: Of the checkpoint.
        manifest: Its manifest.
    """
    for problems in _Check(structure, block_digest, catalog, manifest).stages():
        if problems:
            return problems
    return []


@dataclass(frozen=True)
class _Check:
    structure: IndexStructure
    block_digest: npt.NDArray[np.uint8]
    catalog: Catalog
    manifest: Manifest

    def stages(self) -> Iterator[list[Problem]]:
        yield self.counts()
        yield [*self.structure.id_problems, *self.wasted()]
        yield list(self.structure.box_problems)
        yield self.data()
        yield list(self.structure.tiling_problems)

    def counts(self) -> list[Problem]:
        index, counts = self.structure.index, self.manifest.counts
        pairs = {
            "tensors": (counts.tensors, len(self.catalog.tensors)),
            "files of the catalog": (counts.files, len(self.catalog.files)),
            "files": (counts.files, len(index.file_chunk_count)),
            "chunks": (counts.chunks, len(index.chunk_tensor)),
            "boxes": (counts.boxes, len(index.box_ndim)),
            "blocks": (counts.blocks, len(self.block_digest)),
        }
        return [
            Problem("chunk-index", "count", f"the manifest says {said} {name}, found {found}")
            for name, (said, found) in pairs.items()
            if said != found
        ]

    def wasted(self) -> list[Problem]:
        unused = self.structure.unused
        if not len(unused):
            return []
        is_own = np.array([file.base == "self" for file in self.catalog.files], bool)
        wasted = unused[is_own[self.structure.index.chunk_file[unused]]]
        return self.structure.report(wasted, "unused", "is unused in a file of our own")

    def data(self) -> list[Problem]:
        files, held = self.catalog.files, self.structure.file_bytes
        sizes = np.array([file.size for file in files], np.int64)
        headers = np.array([file.header_bytes for file in files], np.int64)
        if sizes.sum(dtype=float) > MAX_TOTAL_BYTES:
            message = f"files of more than {MAX_TOTAL_BYTES} bytes in all"
            return [Problem("chunk-index", "size", message)]
        problems = [
            Problem(
                files[f].key,
                "size",
                f"is {sizes[f]} bytes, chunks hold {held[f]} behind a header of {headers[f]}",
            )
            for f in np.flatnonzero(sizes - headers != held)[:MAX_REPORTED].tolist()
        ]
        return problems or self._block_digests(headers, int(sizes.sum()))

    def _block_digests(self, headers: Int64s, num_bytes: int) -> list[Problem]:
        files, digests = self.catalog.files, self.block_digest
        algorithm = DigestAlgorithm(self.manifest.digest.algorithm)
        block_size = self.manifest.digest.block_size
        # Before the blocks are laid out, which allocates for each of them.
        if num_bytes > len(digests) * block_size:
            message = f"{len(digests)} blocks of {block_size} do not cover {num_bytes} bytes"
            return [Problem("chunk-index", "blocks", message)]
        num_blocks = -(-headers // block_size) + self.structure.file_blocks(block_size)
        first = np.append(0, np.cumsum(num_blocks)).tolist()
        if first[-1] != len(digests):
            message = f"expected digests of {first[-1]} blocks, found {len(digests)}"
            return [Problem("chunk-index", "blocks", message)]
        data = memoryview(digests.tobytes())
        return [
            Problem(file.key, "digest", f"the catalog says {file.digest}, its blocks {found}")
            for f, file in enumerate(files)
            if (found := fold(data[16 * first[f] : 16 * first[f + 1]], algorithm)) != file.digest
        ][:MAX_REPORTED]
