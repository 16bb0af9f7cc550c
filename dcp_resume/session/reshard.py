"""Write a checkpoint anew for another mesh, offline, without ranks and without holding it.

1. Open. The source's documents are read and proved, and every data file is there at its size.
2. Plan. Each target rank's own chunks of a part lie together in one file (``planning.layouts``).
3. Write. Each file is streamed: verified reads fill a window, the window is digested and written.
4. Commit. The run at the target is opened, documents are written, and the commit is appended.

Until step 4 the target run is only added to: whoever writes there is not disturbed, and a failure
removes the files that were written. Step 4 takes the run over, as every new incarnation does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from dcp_resume.errors import ConfigurationError, LoadRefused, Problem, StorageError, summarise
from dcp_resume.format.digests import choose_block_size, digest_hex
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import (
    CATALOG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    attempt_prefix,
    new_attempt_id,
)
from dcp_resume.manifest.models import DocumentRef, Manifest
from dcp_resume.planning.layout_rules import LayoutRules, TargetMesh
from dcp_resume.planning.layouts import Kept, StoredState, TargetLayout, plan_layout
from dcp_resume.planning.plans import unpad_box
from dcp_resume.session.commit import Committed, choose_newest, commit
from dcp_resume.session.documents import AttemptIdentity, Facts, build_documents
from dcp_resume.session.load import Located
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.ownership import own_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.save import Run
from dcp_resume.session.streaming import FileStreamer
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.session.writing import RankReport
from dcp_resume.storage import ObjectStore, check_exclusive_create

__all__ = ["ReshardOptions", "ReshardResult", "reshard"]

MIN_WINDOW_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ReshardOptions:
    """How to reshard.

    Raises:
        ConfigurationError: The window is too small.
    """

    rules: LayoutRules = field(default_factory=LayoutRules)
    is_strict: bool = False
    """Refuse what could not be laid out as asked, instead of reporting it."""
    window_bytes: int = 64 * 1024 * 1024
    """Bytes in transit; readers, and an upload to S3, need some more beside them."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with bytes written and bytes in all."""

    def __post_init__(self) -> None:
        if self.window_bytes < MIN_WINDOW_BYTES:
            raise ConfigurationError(
                f"the window must have at least {MIN_WINDOW_BYTES} bytes, got {self.window_bytes}",
                option="window_bytes",
            )


@dataclass(frozen=True, slots=True)
class ReshardResult:
    """A committed checkpoint, and what is not as asked."""

    step: int
    seq: int
    """Log number of its commit in the target run."""
    generation: int
    prefix: str
    world_size: int
    num_files: int
    num_bytes: int
    read_bytes: int
    kept: tuple[Kept, ...]
    """Tensors kept replicated over axes of which nothing says how they are split."""
    dropped: tuple[str, ...]
    """Per-rank tensors that another number of ranks cannot use."""
    duration_s: float


def reshard(
    source: ObjectStore,
    located: Located,
    target: ObjectStore,
    mesh: TargetMesh,
    options: ReshardOptions,
) -> ReshardResult:
    """Write the located checkpoint for the ranks of ``mesh`` into the run at ``target``.

    Raises:
        ConfigurationError: The layout does not fit the checkpoint.
        LoadRefused: Strict, and some tensors cannot be laid out as asked; all are listed.
        InvalidCheckpoint: The source is damaged; nothing was committed.
        UnsupportedStore: The target lacks exclusive create.
        CommitRefused: The target's log forbids the commit.
        CommitUnknown: The commit's outcome could not be learned in time.
        Fenced: Another process opened the target run meanwhile.
        StorageError: A store failed; nothing was committed.
    """
    started = time.monotonic()
    opened = open_checkpoint(source, located.prefix, located.manifest)
    layout = plan_layout(_stored_state(opened), mesh, options.rules)
    if options.is_strict:
        _refuse_leftovers(layout)
    log = RunLog(target)
    log.refresh()
    check_exclusive_create(target, f"probe/{new_attempt_id()}/")
    step, attempt = opened.manifest.step, new_attempt_id()
    prefix = attempt_prefix(step, attempt)
    keys = [prefix + name for name in layout.plan.layout.names]
    attempted = _Attempt(source, opened, target, layout, prefix, options)
    try:
        report = attempted.write_files()
        run = own_run(target, log, LonelyVotes(), _chooser(opened.manifest), is_probed=True)
        manifest = attempted.write_documents(run, attempt, report)
    except BaseException:
        _remove(target, [*keys, *(prefix + n for n in (INDEX_NAME, CATALOG_NAME, MANIFEST_NAME))])
        raise
    committed = _commit(run, opened.manifest, attempt, manifest, attempted)
    return ReshardResult(
        step=step,
        seq=committed.seq,
        generation=run.opened.generation,
        prefix=prefix,
        world_size=mesh.world_size,
        num_files=len(keys),
        num_bytes=committed.record.num_bytes,
        read_bytes=attempted.read_bytes,
        kept=layout.kept,
        dropped=layout.dropped,
        duration_s=time.monotonic() - started,
    )


def _stored_state(opened: OpenedCheckpoint) -> StoredState:
    manifest, index = opened.manifest, opened.index
    per_rank: dict[str, list[tuple[int, Box]]] = {}
    for position, entry in enumerate(opened.catalog.tensors):
        if entry.kind != "per_rank":
            continue
        ndim = len(entry.global_shape)
        for chunk in index.chunks_of(position).tolist():
            code = index.chunk_box[chunk]
            box = unpad_box(index.box_offsets[code], index.box_sizes[code], ndim)
            rank = opened.catalog.files[int(index.chunk_file[chunk])].rank
            per_rank.setdefault(entry.fqn, []).append((rank, box))
    return StoredState(
        world_size=manifest.topology.world_size,
        tensors=opened.catalog.tensors,
        meshes={mesh.id: mesh for mesh in manifest.topology.meshes},
        values={leaf.fqn: (leaf.path, leaf.value) for leaf in manifest.leaves},
        num_values={name: part.num_leaves for name, part in manifest.parts.items()},
        per_rank=per_rank,
    )


def _refuse_leftovers(layout: TargetLayout) -> None:
    problems = [
        Problem(kept.fqn, "rule", f"nothing says how axis {', '.join(kept.axes)} splits it")
        for kept in layout.kept
    ]
    problems += [
        Problem(fqn, "per_rank", "its values belong to the ranks that wrote them")
        for fqn in layout.dropped
    ]
    if problems:
        raise LoadRefused(
            f"{len(problems)} tensor(s) cannot be laid out as asked; nothing was written:\n"
            f"{summarise(problems)}\ngive rules for them in a layout file, or leave out strict",
            problems=tuple(problems),
        )


def _chooser(manifest: Manifest) -> Callable[[RunHistory], int | None]:
    """Within one run the new checkpoint descends from its source; elsewhere from the newest."""

    def choose(history: RunHistory) -> int | None:
        own = history.find_attempt(manifest.attempt)
        if own is not None and history.run == manifest.run and history.is_usable(own.seq):
            return own.seq
        return choose_newest(history)

    return choose


def _remove(store: ObjectStore, keys: Sequence[str]) -> None:
    """Take back an attempt that was never offered to the log; what fails stays as litter."""
    with suppress(StorageError):
        store.delete(keys)


class _Attempt:
    """The files and documents of one attempt."""

    def __init__(
        self,
        source: ObjectStore,
        opened: OpenedCheckpoint,
        target: ObjectStore,
        layout: TargetLayout,
        prefix: str,
        options: ReshardOptions,
    ) -> None:
        self._opened = opened
        self._target = target
        self._layout = layout
        self._prefix = prefix
        self._options = options
        self._done = 0
        chunks, tensors = layout.plan.layout.chunks, layout.plan.tensors
        itemsize = np.asarray([ITEMSIZES[entry.dtype] for entry in tensors] or [1], np.int64)
        self._total = int((chunks.sizes.prod(axis=1) * itemsize[chunks.tensor]).sum())
        self._block_size = choose_block_size(self._total)
        self._streamer = FileStreamer(
            source,
            opened,
            window_bytes=max(1, min(options.window_bytes, self._total)),
            progress=self._advance,
        )
        self.planned_at = 0
        self.parent: int | None = None
        self.num_bytes = 0

    @property
    def read_bytes(self) -> int:
        """Bytes fetched from the source."""
        return self._streamer.read_bytes

    def write_files(self) -> RankReport:
        """Step 3."""
        plan = self._layout.plan
        self._target.prepare(self._prefix)
        reports = [
            self._streamer.write(
                plan.layout, plan.tensors, file, self._target, self._prefix + name, self._block_size
            )
            for file, name in enumerate(plan.layout.names)
        ]
        empty = np.zeros(0, np.int64)
        return RankReport(
            sizes=np.concatenate([empty, *(r.sizes for r in reports)]),
            header_sizes=np.concatenate([empty, *(r.header_sizes for r in reports)]),
            num_blocks=np.concatenate([empty, *(r.num_blocks for r in reports)]),
            digests=np.concatenate([np.zeros((0, 16), np.uint8), *(r.digests for r in reports)]),
        )

    def write_documents(self, run: Run, attempt: str, report: RankReport) -> DocumentRef:
        """Step 4, up to the commit."""
        history = run.log.refresh()
        newest = history.newest()
        self.planned_at, self.parent = history.last_seq, newest.seq if newest else None
        facts = self._opened.manifest
        documents = build_documents(
            self._layout.plan,
            [report],
            AttemptIdentity(
                run=str(history.run),
                step=facts.step,
                attempt=attempt,
                generation=run.opened.generation,
                parent=self.parent,
                resume_source=run.opened.resume_source,
            ),
            Facts(facts.trainer, facts.model, facts.optimizer, self._layout.stages),
            self._block_size,
        )
        self.num_bytes = documents.manifest.counts.num_bytes
        for name, data in (
            (INDEX_NAME, documents.index_bytes),
            (CATALOG_NAME, documents.catalog_bytes),
            (MANIFEST_NAME, documents.manifest_bytes),
        ):
            self._target.write(self._prefix + name, [memoryview(data)])
        return DocumentRef(
            key=self._prefix + MANIFEST_NAME,
            size=len(documents.manifest_bytes),
            digest=digest_hex(documents.manifest_bytes),
        )

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._options.progress(self._done, self._total)


def _commit(
    run: Run, source: Manifest, attempt: str, manifest: DocumentRef, attempted: _Attempt
) -> Committed:
    return commit(
        run.log,
        generation=run.opened.generation,
        step=source.step,
        attempt=attempt,
        manifest=manifest,
        parent=attempted.parent,
        references=(),
        planned_at=attempted.planned_at,
        num_bytes=attempted.num_bytes,
        trainer=source.trainer,
    )
