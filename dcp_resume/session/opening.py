"""Open one checkpoint: read its documents, prove them, and list everything that is wrong.

Nothing is trusted: sizes are capped, digests are checked over exact bytes, and every box, place
and count is proved to be consistent before a data file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import (
    InvalidCheckpoint,
    InvalidDocument,
    KeyNotFound,
    MissingAncestors,
    Problem,
    ShortRead,
    Untrusted,
)
from dcp_resume.format.chunk_index import UNUSED, ChunkIndex
from dcp_resume.format.digests import (
    DigestAlgorithm,
    FileBlocks,
    check_digest,
    digest_bytes,
)
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.index_check import check_index
from dcp_resume.manifest.checks import catalog_problems, manifest_problems
from dcp_resume.manifest.keys import MANIFEST_NAME, MAX_KEY_BYTES, is_relative_key
from dcp_resume.manifest.models import Catalog, DocumentRef, Manifest, TensorEntry
from dcp_resume.manifest.signing import ANYONE, Trust
from dcp_resume.manifest.wire import MAX_MANIFEST_BYTES, decode_catalog, decode_manifest
from dcp_resume.problems import summarise
from dcp_resume.storage import ObjectStore

__all__ = ["OpenedCheckpoint", "open_checkpoint"]


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint whose documents have been proved."""

    prefix: str
    """Of the manifest's directory, from the root of the store; empty or ending in a slash."""
    manifest: Manifest
    catalog: Catalog
    index: ChunkIndex

    @cached_property
    def itemsizes(self) -> npt.NDArray[np.int64]:
        """``[tensors]`` bytes of an element."""
        return np.asarray([ITEMSIZES[t.dtype] for t in self.catalog.tensors], np.int64)

    @cached_property
    def header_bytes(self) -> npt.NDArray[np.int64]:
        """``[files]`` bytes before the first chunk."""
        return np.asarray([file.header_bytes for file in self.catalog.files], np.int64)

    @cached_property
    def begins(self) -> npt.NDArray[np.int64]:
        """``[chunks]`` position of each chunk in its file."""
        return self.index.chunk_begin(self.itemsizes, self.header_bytes)

    @cached_property
    def blocks(self) -> FileBlocks:
        """Where the digest blocks of every file lie."""
        block_size = self.manifest.digest.block_size
        return self.index.blocks(self.itemsizes, self.header_bytes, block_size)

    @cached_property
    def tensor_ids(self) -> dict[str, int]:
        """FQN → position in the catalog; an alias has the position of what it stands for."""
        ids = {entry.fqn: position for position, entry in enumerate(self.catalog.tensors)}
        return {
            entry.fqn: ids[entry.alias_of] if entry.alias_of else ids[entry.fqn]
            for entry in self.catalog.tensors
        }

    def entry(self, fqn: str) -> TensorEntry:
        """The entry of a tensor; of an alias that of what it stands for."""
        return self.catalog.tensors[self.tensor_ids[fqn]]

    @cached_property
    def _bounds(self) -> dict[int, npt.NDArray[np.int64]]:
        return {}

    def block_bounds(self, file: int) -> npt.NDArray[np.int64]:
        """``[blocks + 1]`` where the blocks of a file start, and its size; worked out once."""
        if file not in self._bounds:
            self._bounds[file] = self.blocks.bounds(file)
        return self._bounds[file]

    def block_digests(self, file: int, block: int, data: memoryview) -> tuple[bytes, bytes]:
        """The digest that the bytes of a block have, and the one they must have."""
        expected = self.index.block_digest[int(self.blocks.first[file]) + block]
        algorithm = DigestAlgorithm(self.manifest.digest.algorithm)
        return digest_bytes([data], algorithm), expected.tobytes()

    def fqns_in_block(self, file: int, block: int) -> list[str]:
        """Tensors with bytes in a block; none for a block of the header."""
        ids = self.index.tensors_in_block(file, block, blocks=self.blocks, begins=self.begins)
        return [self.catalog.tensors[number].fqn for number in ids]

    def chunks_in_block(self, file: int, block: int) -> list[str]:
        """Chunks with bytes in a block, as ``fqn[0:4, 8:16]``; none for a block of the header."""
        start, stop = self.block_bounds(file)[block : block + 2].tolist()
        first, last = self.index.file_bounds(file)
        begins = self.begins[first:last]
        ends = np.append(begins[1:], self.blocks.sizes[file])[: len(begins)]
        is_inside = (begins < stop) & (ends > start) & (ends > begins)
        is_used = self.index.chunk_tensor[first:last] != UNUSED  # else an ancestor's, passed over
        return [self._chunk_text(first + n) for n in np.flatnonzero(is_inside & is_used).tolist()]

    def _chunk_text(self, chunk: int) -> str:
        entry = self.catalog.tensors[int(self.index.chunk_tensor[chunk])]
        code = self.index.chunk_box[chunk]
        offsets, sizes = self.index.box_offsets[code].tolist(), self.index.box_sizes[code].tolist()
        dims = zip(offsets, sizes, entry.global_shape, strict=False)
        box = ", ".join(f"{offset}:{offset + size}" for offset, size, _ in dims)
        return f"{entry.fqn}[{box}]" if box else entry.fqn

    def file_key(self, file: int) -> str:
        """Key of a data file from the root of the store."""
        entry = self.catalog.files[file]
        base = self.prefix if entry.base == "self" else entry.base + "/"
        return base + entry.key


def open_checkpoint(
    store: ObjectStore,
    prefix: str,
    reference: DocumentRef | None,
    *,
    trust: Trust = ANYONE,
    is_listed: bool = True,
) -> OpenedCheckpoint:
    """Read and prove the documents of one checkpoint.

    Args:
        store: Holds the checkpoint.
        prefix: Of the manifest's directory; empty where the store's root is that directory.
        reference: What the commit record says of the manifest; None to open a directory that was
            copied without its log, whose manifest then vouches for itself.
        trust: Whose manifest is believed.
        is_listed: Whether to prove by one listing that every data file is there at its size.

    Raises:
        InvalidCheckpoint: A document is missing, damaged or contradicts another; ``problems`` lists
            every fault found.
        Untrusted: The manifest is not signed by whom the policy trusts, or rests on weak digests.
        UnsupportedFormat: Written by a newer format.
        StorageError: The store failed.
    """
    manifest = _read_manifest(store, prefix, reference, trust)
    catalog_key = prefix + manifest.catalog.key
    catalog_bytes = _read(store, catalog_key, manifest.catalog.size)
    check_digest(catalog_bytes, manifest.catalog.digest, catalog_key)
    catalog = decode_catalog(catalog_bytes, catalog_key)
    _refuse(prefix, list(catalog_problems(manifest, catalog, ITEMSIZES)))
    index_key = prefix + manifest.chunk_index.key
    index_bytes = _read(store, index_key, manifest.chunk_index.size)
    check_digest(index_bytes, manifest.chunk_index.digest, index_key)
    index = ChunkIndex.from_bytes(index_bytes, index_key)
    _refuse(prefix, check_index(index, catalog, manifest))
    opened = OpenedCheckpoint(prefix, manifest, catalog, index)
    if is_listed:
        check_files(store, opened)
    return opened


def _read_manifest(
    store: ObjectStore, prefix: str, reference: DocumentRef | None, trust: Trust
) -> Manifest:
    """Read the manifest, and prove all that it says by itself before anything is read by it."""
    key = reference.key if reference else prefix + MANIFEST_NAME
    if reference and not is_relative_key(key):
        message = "the commit record names a manifest outside of the run"
        _refuse(key, [Problem(key[:MAX_KEY_BYTES], "path_escape", message)])
    size = reference.size if reference else MAX_MANIFEST_BYTES
    data = _read(store, key, min(size, MAX_MANIFEST_BYTES))
    if reference:
        check_digest(data, reference.digest, key)
    trust.check(data, MANIFEST_NAME, key)
    manifest = decode_manifest(data, key)
    if trust.is_strict and manifest.digest.algorithm != DigestAlgorithm.SHA256.value:
        message = f"it is signed, but rests on {manifest.digest.algorithm}, which can be forged"
        problem = Problem(key, "weak_digest", message)
        raise Untrusted(f"cannot trust {problem}; save it again", problems=(problem,))
    problems = list(manifest_problems(manifest))
    if prefix not in ("", f"step-{manifest.step:08d}/{manifest.attempt}/"):
        message = f"it is of step {manifest.step}, attempt {manifest.attempt!r:.40}"
        problems.append(Problem(key, "place", message))
    _refuse(prefix, problems)
    return manifest


def _read(store: ObjectStore, key: str, size: int) -> bytes:
    try:
        return store.read(key, max_bytes=size)
    except (KeyNotFound, ShortRead) as error:
        problem = Problem(key, "missing" if isinstance(error, KeyNotFound) else "size", str(error))
        raise InvalidDocument(f"cannot open the checkpoint: {problem}", problems=(problem,)) from (
            error
        )


def _refuse(prefix: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise InvalidDocument(
            f"{prefix or 'the checkpoint'} contradicts itself in {len(problems)} place(s):\n"
            f"{summarise(problems)}\nuse another checkpoint",
            problems=tuple(problems),
        )


def check_files(store: ObjectStore, opened: OpenedCheckpoint) -> None:
    """Prove that every data file is there at its size, by one listing a base.

    Raises:
        MissingAncestors: Only files of other checkpoints are missing.
        InvalidCheckpoint: Files are missing or have another size; all are listed.
        StorageError: The store failed.
    """
    bases = {file.base for file in opened.catalog.files}
    prefixes = {opened.prefix if base == "self" else base + "/" for base in bases}
    found = {info.key: info.size for p in sorted(prefixes) for info in store.list(p)}
    problems: list[Problem] = []
    are_ancestors = True
    for position, file in enumerate(opened.catalog.files):
        key = opened.file_key(position)
        size = found.get(key)
        if size == file.size:
            continue
        are_ancestors = are_ancestors and file.base != "self"
        message = "no such file" if size is None else f"expected {file.size} bytes, found {size}"
        problems.append(Problem(key, "missing" if size is None else "size", message))
    if not problems:
        return
    if are_ancestors:
        raise MissingAncestors(
            f"{opened.prefix} refers to files of older checkpoints that are not at hand:\n"
            f"{summarise(problems)}\nopen it in its run, or "
            f"make it self-contained there: dcp-resume materialize RUN --step "
            f"{opened.manifest.step}",
            problems=tuple(problems),
        )
    raise InvalidCheckpoint(
        f"data files of {opened.prefix or 'the checkpoint'} are missing or damaged:\n"
        f"{summarise(problems)}\nuse another checkpoint",
        problems=tuple(problems),
    )
