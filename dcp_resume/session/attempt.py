"""The coordinator's side of one save: begin an attempt, and make it a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dcp_resume.errors import StorageError, StoreNotShared
from dcp_resume.format.digests import DigestAlgorithm, choose_block_size, digest_hex
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import (
    CATALOG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    attempt_prefix,
    new_attempt_id,
)
from dcp_resume.manifest.models import DocumentRef, FileEntry
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.session.commit import Committed, Opened, commit
from dcp_resume.session.documents import (
    AttemptIdentity,
    Documents,
    Facts,
    FileTables,
    build_documents,
    planned_tables,
)
from dcp_resume.session.milestones import Milestones
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.unchanged import Unchanged
from dcp_resume.session.writing import RankReport
from dcp_resume.storage import ObjectStore

__all__ = ["Attempt", "Order", "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """A run that this incarnation has opened."""

    store: ObjectStore
    log: RunLog
    opened: Opened


@dataclass(frozen=True, slots=True)
class Order:
    """What the coordinator tells every rank alike."""

    NUM_BYTES: ClassVar[int] = 88

    attempt: str
    step: int
    block_size: int
    algorithm: DigestAlgorithm
    """Of the blocks' digests; told by the coordinator, so that no rank uses another."""
    tensor_digests: TensorDigests
    unchanged: Unchanged = Unchanged.WRITE
    refers_to: int = 0
    """Log number of the commit whose files need not be written again; 0 to write in full."""

    @property
    def prefix(self) -> str:
        """Prefix of the attempt's files."""
        return attempt_prefix(self.step, self.attempt)

    def to_bytes(self) -> bytes:
        """Serialise for the ranks, into ``NUM_BYTES``."""
        head = self.block_size.to_bytes(8, "little") + self.step.to_bytes(8, "little")
        names = self.attempt.encode().ljust(32) + self.algorithm.value.encode().ljust(16)
        words = self.tensor_digests.value.encode().ljust(8) + self.unchanged.value.encode().ljust(8)
        return head + names + words + self.refers_to.to_bytes(8, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> Order:
        """Read what ``to_bytes`` wrote."""
        return cls(
            attempt=data[16:48].decode().strip(),
            step=int.from_bytes(data[8:16], "little"),
            block_size=int.from_bytes(data[:8], "little"),
            algorithm=DigestAlgorithm(data[48:64].decode().strip()),
            tensor_digests=TensorDigests(data[64:72].decode().strip()),
            unchanged=Unchanged(data[72:80].decode().strip()),
            refers_to=int.from_bytes(data[80:88], "little"),
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to write one step, as the coordinator knows it."""

    run: Run
    identity: AttemptIdentity
    plan: GlobalPlan
    planned_at: int
    """Last log number read when the parent was chosen."""
    block_size: int
    tensor_digests: TensorDigests = TensorDigests.OMIT
    unchanged: Unchanged = Unchanged.WRITE
    refers_to: int = 0
    """Log number of the parent if its files may be referred to; 0 to write in full."""

    @classmethod
    def begin(
        cls,
        run: Run,
        plan: GlobalPlan,
        step: int,
        tensor_digests: TensorDigests = TensorDigests.OMIT,
        unchanged: Unchanged = Unchanged.WRITE,
        find_parent: Callable[[RunHistory], int] = lambda history: 0,
    ) -> Attempt:
        """Name the attempt, and make its directories durable.

        Args:
            run: The opened run.
            plan: Of all ranks.
            step: Optimizer steps completed.
            tensor_digests: Whether to record a digest of each tensor.
            unchanged: Whether ranks remember what they write.
            find_parent: Returns the newest commit if its files may be referred to, else 0.

        Raises:
            StorageError: The store failed.
        """
        history = run.log.refresh()
        newest = history.newest()
        identity = AttemptIdentity(
            run=str(history.run),
            step=step,
            attempt=new_attempt_id(),
            generation=run.opened.generation,
            parent=newest.seq if newest else None,
            resume_source=run.opened.resume_source,
        )
        run.store.prepare(attempt_prefix(step, identity.attempt))
        block_size = choose_block_size(plan.layout.num_bytes)
        return cls(
            run,
            identity,
            plan,
            history.last_seq,
            block_size,
            tensor_digests,
            unchanged,
            find_parent(history),
        )

    @property
    def order(self) -> Order:
        """What every rank is told."""
        identity = self.identity
        return Order(
            identity.attempt,
            identity.step,
            self.block_size,
            self.algorithm,
            self.tensor_digests,
            self.unchanged,
            self.refers_to,
        )

    @property
    def algorithm(self) -> DigestAlgorithm:
        """Of every digest: a signed checkpoint rests on one that cannot be forged."""
        return DigestAlgorithm(self.run.log.signing.digest_algorithm)

    def commit(
        self,
        reports: Sequence[RankReport],
        facts: Facts,
        late_values: Mapping[str, tuple[Any, Any]] | None = None,
        milestones: Milestones | None = None,
    ) -> Committed:
        """Make an attempt that was written as planned a checkpoint.

        Args:
            reports: What each rank wrote.
            facts: For the manifest.
            late_values: Non-tensor leaves that came with the reports.
            milestones: Of the save on this rank; None where times are not measured.

        Raises:
            IncompletePlan: Readers would refuse the checkpoint.
            StoreNotShared: Files of some ranks are not visible here.
            CommitRefused: The log forbids the commit.
            CommitUnknown: The outcome could not be learned in time.
            Fenced: A newer incarnation owns the run.
            StorageError: The store failed; the attempt did not commit.
        """
        tables = planned_tables(self.plan, reports, self.algorithm)
        documents = self.describe(tables, reports, facts, late_values)
        return self.append(documents, facts, milestones=milestones)

    def describe(
        self,
        tables: FileTables,
        reports: Sequence[RankReport],
        facts: Facts,
        late_values: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> Documents:
        """The documents of what was written.

        Raises:
            IncompletePlan: Readers would refuse the checkpoint.
        """
        return build_documents(
            self.plan,
            tables,
            reports,
            self.identity,
            facts,
            self.block_size,
            late_values or {},
            self.run.log.signing,
        )

    def append(
        self,
        documents: Documents,
        facts: Facts,
        references: Iterable[int] = (),
        milestones: Milestones | None = None,
    ) -> Committed:
        """Check that every file is there, write the documents, append the commit.

        Args:
            documents: Of the attempt.
            facts: For the commit record.
            references: Commits to whose files the documents refer.
            milestones: Of the save on this rank; None where times are not measured.

        Raises:
            StoreNotShared: Files of some ranks are not visible here.
            ParentRetired: A checkpoint that is referred to was retired or quarantined meanwhile.
            CommitRefused: The log forbids the commit.
            CommitUnknown: The outcome could not be learned in time.
            Fenced: A newer incarnation owns the run.
            StorageError: The store failed; the attempt did not commit.
        """
        prefix = attempt_prefix(self.identity.step, self.identity.attempt)
        own = [file for file in documents.catalog.files if file.base == "self"]
        self._check_listing(prefix, own)
        if milestones is not None:
            milestones.reach("durable")
        self._write_documents(prefix, documents)
        ranks = documents.catalog.rank_times
        times = milestones.times(ranks) if milestones is not None and ranks is not None else None
        return commit(
            self.run.log,
            generation=self.identity.generation,
            step=self.identity.step,
            attempt=self.identity.attempt,
            manifest=DocumentRef(
                key=prefix + MANIFEST_NAME,
                size=len(documents.manifest_bytes),
                digest=digest_hex(documents.manifest_bytes, self.algorithm),
            ),
            parent=self.identity.parent,
            references=references,
            planned_at=self.planned_at,
            num_bytes=documents.manifest.counts.num_bytes,
            trainer=facts.trainer,
            times=times,
        )

    def _check_listing(self, prefix: str, files: Sequence[FileEntry]) -> None:
        store, step = self.run.store, self.identity.step
        found = {info.key: info.size for info in store.list(prefix)}
        unseen = sorted({file.rank for file in files if prefix + file.key not in found})
        if unseen:
            raise StoreNotShared(
                f"step {step}: the coordinator does not see the files that rank(s) "
                f"{', '.join(map(str, unseen))} wrote below {store.url}/{prefix}. Use a root that "
                f"is the same storage on every host (shared file system or s3://)",
                step=step,
                ranks=tuple(unseen),
            )
        for file in files:
            if found[prefix + file.key] != file.size:
                raise StorageError(
                    f"{prefix + file.key} has {found[prefix + file.key]} bytes, rank {file.rank} "
                    f"wrote {file.size}; the attempt is dropped",
                    url=store.url,
                    key=prefix + file.key,
                )

    def _write_documents(self, prefix: str, documents: Documents) -> None:
        for name, data in (
            (INDEX_NAME, documents.index_bytes),
            (CATALOG_NAME, documents.catalog_bytes),
            (MANIFEST_NAME, documents.manifest_bytes),
        ):
            self.run.store.write(prefix + name, [memoryview(data)])
