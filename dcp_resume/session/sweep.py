"""Mark and sweep: delete what retired checkpoints left, and no live one needs.

A checkpoint is one directory, whose name no other attempt ever has; it may refer to files in the
directories of older ones. So what a retired checkpoint left is what a listing of its directory
shows, minus the keys that the documents of live checkpoints name. Its own documents are not read:
a damaged checkpoint is deleted too, and so is the rest of one whose deletion was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from dcp_resume.errors import InvalidCheckpoint, InvalidDocument, KeyNotFound, Problem, ShortRead
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import parse_attempt_prefix
from dcp_resume.manifest.records import CommitRecord
from dcp_resume.manifest.wire import decode_catalog, decode_manifest
from dcp_resume.storage import ObjectInfo, ObjectStore

__all__ = ["Needs", "Swept", "delete_swept", "directory_of", "read_needs", "sweep", "unneeded"]

Needs = Callable[[ObjectStore, CommitRecord], Set[str]]


@dataclass(frozen=True, slots=True)
class Swept:
    """What was deleted."""

    num_files: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, infos: Iterable[ObjectInfo]) -> Swept:
        """The sum of a listing."""
        sizes = [info.size for info in infos]
        return cls(len(sizes), sum(sizes))

    def __add__(self, other: Swept) -> Swept:
        return Swept(self.num_files + other.num_files, self.num_bytes + other.num_bytes)


def read_needs(store: ObjectStore, record: CommitRecord) -> Set[str]:
    """Every key that a checkpoint needs: its documents, and its files in any directory.

    Raises:
        InvalidCheckpoint: Its manifest or catalog is damaged.
        KeyNotFound: One of them is missing.
        ShortRead: One of them has another size.
        StorageError: The store failed.
    """
    from dcp_resume.format.digests import check_digest  # loads numpy

    reference, prefix = record.manifest, directory_of(record)
    data = store.read(reference.key, max_bytes=reference.size)
    check_digest(data, reference.digest, reference.key)
    manifest = decode_manifest(data, reference.key)
    catalog_key = prefix + manifest.catalog.key
    catalog_bytes = store.read(catalog_key, max_bytes=manifest.catalog.size)
    check_digest(catalog_bytes, manifest.catalog.digest, catalog_key)
    files = decode_catalog(catalog_bytes, catalog_key).files
    return {
        reference.key,
        catalog_key,
        prefix + manifest.chunk_index.key,
        *((prefix if file.base == "self" else file.base + "/") + file.key for file in files),
    }


def sweep(
    store: ObjectStore, history: RunHistory, target: int, *, needs: Needs = read_needs
) -> Swept:
    """Delete what a retired commit, and the retired ones that it referred to, left behind.

    May be repeated, and run beside another sweep of the same commit.

    Args:
        store: Root of the run.
        history: The log up to the commit's ``retire``, or further.
        target: Log number of the commit.
        needs: Reads what a live checkpoint needs.

    Raises:
        ValueError: The commit is not retired.
        InvalidDocument: Its record names a directory that is not its own.
        StorageError: The store failed; some files may remain.
    """
    if target not in history.retired:
        raise ValueError(f"commit {target} is not retired")
    elders = [seq for seq in history.commits[target].references if seq in history.retired]
    swept = Swept()
    for seq in (target, *elders):
        listing = list(store.list(directory_of(history.commits[seq])))
        found = unneeded(store, history, seq, listing, needs=needs)
        swept += delete_swept(store, history.commits[seq], found)
    return swept


def unneeded(
    store: ObjectStore,
    history: RunHistory,
    seq: int,
    listing: Iterable[ObjectInfo],
    *,
    needs: Needs = read_needs,
) -> list[ObjectInfo]:
    """Those files in the directory of a retired commit that no live commit needs.

    Raises:
        StorageError: The store failed.
    """
    marked: set[str] = set()
    for record in history.live_commits().values():
        if seq in record.references:
            try:
                marked |= needs(store, record)
            except (InvalidCheckpoint, KeyNotFound, ShortRead):
                return []  # nobody can tell what a damaged checkpoint needs, and it is kept
    return [info for info in listing if info.key not in marked]


def delete_swept(store: ObjectStore, record: CommitRecord, found: Iterable[ObjectInfo]) -> Swept:
    """Delete files of a retired commit, the manifest first: what is left opens nowhere.

    Raises:
        StorageError: The store failed; some files may remain.
    """
    infos = list(found)
    for is_first in (True, False):
        keys = [info.key for info in infos if (info.key == record.manifest.key) == is_first]
        if keys:
            store.delete(keys)
    return Swept.of(infos)


def directory_of(record: CommitRecord) -> str:
    """Prefix of a commit's own files, proved to be a directory that no other attempt has.

    Raises:
        InvalidDocument: The record names another place.
    """
    key = record.manifest.key
    directory = key[: key.rfind("/") + 1]
    if parse_attempt_prefix(key) != (record.step, record.attempt) or directory.count("/") != 2:
        message = f"expected a directory of step {record.step}, attempt {record.attempt}"
        problem = Problem("commit:manifest.key", "path_escape", f"{message}, found {key!r}")
        raise InvalidDocument(
            f"the commit of step {record.step} names a manifest outside its own directory: "
            f"{problem}. Nothing of it is deleted.",
            problems=(problem,),
        )
    return directory
