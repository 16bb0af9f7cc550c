"""Where a checkpoint lies."""

from __future__ import annotations

import json
from dataclasses import dataclass

from dcp_resume.manifest.history import CommitEntry
from dcp_resume.manifest.models import DocumentRef

__all__ = ["Located"]


@dataclass(frozen=True, slots=True)
class Located:
    """Where a checkpoint lies; what step 1 of a load tells every rank."""

    seq: int
    """Log number of its commit; 0 for a directory without a log."""
    prefix: str
    manifest: DocumentRef | None

    @classmethod
    def of(cls, entry: CommitEntry) -> Located:
        """The place that a commit record names."""
        directory, slash, _ = entry.record.manifest.key.rpartition("/")
        return cls(entry.seq, directory + slash, entry.record.manifest)

    def to_bytes(self) -> bytes:
        """Serialise for another rank."""
        reference = self.manifest.model_dump(mode="json") if self.manifest else None
        return json.dumps([self.seq, self.prefix, reference]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Located:
        """Read what ``to_bytes`` wrote."""
        seq, prefix, reference = json.loads(data)
        return cls(seq, prefix, DocumentRef.model_validate(reference) if reference else None)
