"""Delete the files of a retired checkpoint: exactly the keys that its catalog names."""

from __future__ import annotations

from dcp_resume.format.digests import check_digest
from dcp_resume.manifest.records import CommitRecord
from dcp_resume.manifest.wire import decode_catalog, decode_manifest
from dcp_resume.storage import ObjectStore

__all__ = ["sweep"]


def sweep(store: ObjectStore, record: CommitRecord) -> int:
    """Delete what a retired commit alone holds; call it after its ``retire`` was appended.

    Files of other checkpoints that it refers to are not its own. The manifest goes last, so that a
    sweep that was cut off can be repeated.

    Returns:
        Bytes of the deleted data files.

    Raises:
        InvalidCheckpoint: Its manifest or catalog is damaged, so that its keys are not known.
        StorageError: The store failed; some files may remain.
    """
    reference = record.manifest
    prefix = reference.key[: reference.key.rindex("/") + 1]
    data = store.read(reference.key, max_bytes=reference.size)
    check_digest(data, reference.digest, reference.key)
    manifest = decode_manifest(data, reference.key)
    catalog_key = prefix + manifest.catalog.key
    catalog_bytes = store.read(catalog_key, max_bytes=manifest.catalog.size)
    check_digest(catalog_bytes, manifest.catalog.digest, catalog_key)
    own = [f for f in decode_catalog(catalog_bytes, catalog_key).files if f.base == "self"]
    store.delete(prefix + file.key for file in own)
    store.delete([prefix + manifest.chunk_index.key])
    store.delete([catalog_key])
    store.delete([reference.key])
    return sum(file.size for file in own)
