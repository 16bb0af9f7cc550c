"""A run made by hand on any store: real records and documents, data files of a few bytes.

No torch and no ranks, so that a run of many incarnations takes milliseconds. Attempts are named in
order (``a1``, ``a2``, …), so that equal calls give equal keys on every store.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from dcp_resume.format.digests import digest_hex
from dcp_resume.manifest.history import CommitEntry
from dcp_resume.manifest.keys import CATALOG_NAME, INDEX_NAME, MANIFEST_NAME, attempt_prefix
from dcp_resume.manifest.models import (
    Catalog,
    Counts,
    DigestRule,
    DocumentRef,
    FileEntry,
    FormatMark,
    IndexRef,
    Manifest,
    Software,
    Topology,
    TrainerFacts,
)
from dcp_resume.manifest.wire import encode
from dcp_resume.session import marks
from dcp_resume.session.commit import commit, open_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.storage import ObjectStore

__all__ = ["BuiltRun"]

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
RUN = "00000000-0000-0000-0000-000000000001"
SHARD = "shard-00001-model-00001-of-00001.safetensors"


class BuiltRun:
    """A run, opened once."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.day = 0.0
        self.log = RunLog(store, run=RUN, now=lambda: BEGIN + timedelta(days=self.day))
        self._num_attempts = 0
        self._num_opens = 0
        self.generation = 0
        self.open(None)

    def open(self, step: int | None) -> None:
        """A new incarnation resumes from a step; None begins anew."""
        self._num_opens += 1
        source = None if step is None else self.find(step).seq
        opened = open_run(self.log, incarnation=f"i{self._num_opens}", choose=lambda _: source)
        self.generation = opened.generation

    def find(self, step: int) -> CommitEntry:
        """The checkpoint of a step that was not retired, the youngest if there are several."""
        live = sorted(self.log.history.live_commits().items(), reverse=True)
        return next(CommitEntry(*one) for one in live if one[1].step == step)

    def attempt(self, step: int) -> str:
        """Files of an attempt that does not commit; returns its id."""
        self._num_attempts += 1
        name = f"a{self._num_attempts}"
        self.store.write(attempt_prefix(step, name) + SHARD, [memoryview(b"half")])
        return name

    def save(
        self, *steps: int, days: float = 1.0, is_incremental: bool = False, **metrics: float
    ) -> None:
        """Commit steps, each ``days`` after what came before.

        Args:
            steps: The steps.
            days: Between two commits.
            is_incremental: Refer to every file that the newest checkpoint needs, too.
            metrics: Of the trainer state.
        """
        for step in steps:
            self.day += days
            self._save(step, self.attempt(step), is_incremental, metrics)

    def _save(
        self, step: int, attempt: str, is_incremental: bool, metrics: dict[str, float]
    ) -> None:
        history = self.log.history
        parent = history.newest() if is_incremental else None
        prefix = attempt_prefix(step, attempt)
        files = [_file("self")]
        if parent is not None:
            seqs = (parent.seq, *parent.record.references)
            records = [history.commits[seq] for seq in seqs]
            files += [_file(attempt_prefix(r.step, r.attempt).rstrip("/")) for r in records]
        catalog = encode(Catalog(format=FormatMark(), tensors=(), files=tuple(files)))
        trainer = TrainerFacts(step=step, metrics=metrics)
        manifest = encode(_manifest(step, attempt, self.generation, trainer, catalog))
        documents = ((INDEX_NAME, b"index"), (CATALOG_NAME, catalog), (MANIFEST_NAME, manifest))
        for name, data in documents:
            self.store.write(prefix + name, [memoryview(data)])
        commit(
            self.log,
            generation=self.generation,
            step=step,
            attempt=attempt,
            manifest=_reference(prefix + MANIFEST_NAME, manifest),
            parent=parent.seq if parent else None,
            references=[parent.seq, *parent.record.references] if parent else [],
            planned_at=history.last_seq,
            num_bytes=4,
            trainer=trainer,
        )

    def pin(self, step: int) -> None:
        marks.pin(self.log, self.find(step).seq)

    def unpin(self, step: int) -> None:
        marks.unpin(self.log, self.find(step).seq)

    def tag(self, step: int, name: str) -> None:
        marks.tag(self.log, self.find(step).seq, name)

    def quarantine(self, step: int) -> None:
        marks.quarantine(self.log, self.find(step).seq)

    def retire(self, step: int) -> None:
        marks.retire(self.log, self.find(step).seq)

    def key(self, step: int, name: str = MANIFEST_NAME) -> str:
        """Key of a file of a step."""
        return self.find(step).record.manifest.key.removesuffix(MANIFEST_NAME) + name

    def damage(self, step: int, name: str = MANIFEST_NAME) -> None:
        self.store.write(self.key(step, name), [memoryview(b"{")])

    def lose(self, step: int, name: str = MANIFEST_NAME) -> None:
        self.store.delete([self.key(step, name)])

    def attempt_keys(self) -> list[str]:
        """Every key of every attempt."""
        return [info.key for info in self.store.list("step-")]


def _file(base: str) -> FileEntry:
    return FileEntry(
        base=base,
        key=SHARD,
        part="model",
        rank=0,
        size=4,
        header_bytes=0,
        digest=digest_hex(b"half"),
    )


def _reference(key: str, data: bytes) -> DocumentRef:
    return DocumentRef(key=key, size=len(data), digest=digest_hex(data))


def _manifest(
    step: int, attempt: str, generation: int, trainer: TrainerFacts, catalog: bytes
) -> Manifest:
    index = IndexRef(
        key=INDEX_NAME,
        size=5,
        digest=digest_hex(b"index"),
        block_size=2**16,
        block_digests=(digest_hex(b"index").partition(":")[2],),
    )
    return Manifest(
        format=FormatMark(),
        run=RUN,
        attempt=attempt,
        step=step,
        generation=generation,
        parent=None,
        resume_source=None,
        created="2026-01-01T00:00:00Z",
        topology=Topology(world_size=1),
        trainer=trainer,
        software=Software(dcp_resume="0", torch="0", python="0"),
        parts={},
        digest=DigestRule(block_size=2**16),
        counts=Counts(tensors=0, chunks=0, boxes=0, blocks=0, files=1, num_bytes=4),
        catalog=_reference(CATALOG_NAME, catalog),
        chunk_index=index,
    )
