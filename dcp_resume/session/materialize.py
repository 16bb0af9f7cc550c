"""Make a checkpoint self-contained: write all that it refers to into a new attempt of its step.

The chunks, their boxes and the ranks that wrote them stay; only the files are new. Within the run
the new checkpoint descends from the old one, and the run is taken over twice: for the commit, and
then from it, so that the old one is no resume source any more, and its elders can be pruned.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from dcp_resume.errors import ConfigurationError
from dcp_resume.format.chunk_index import UNUSED
from dcp_resume.manifest.keys import new_attempt_id
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.files import lay_out_files
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.planning.table import Table
from dcp_resume.session.commit import choose_newest
from dcp_resume.session.documents import Facts
from dcp_resume.session.located import Located
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.ownership import own_run
from dcp_resume.session.rewriting import RewriteOptions, rewrite
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.storage import ObjectStore, check_exclusive_create

__all__ = ["Materialized", "materialize"]


@dataclass(frozen=True, slots=True)
class Materialized:
    """A committed checkpoint that needs no other."""

    step: int
    seq: int
    """Log number of its commit in the target run."""
    prefix: str
    num_files: int
    num_bytes: int
    read_bytes: int
    duration_s: float


def materialize(
    source: ObjectStore, located: Located, target: ObjectStore, options: RewriteOptions
) -> Materialized:
    """Write the located checkpoint, whole, into the run at ``target``, which may be its own.

    Raises:
        ConfigurationError: It is not the newest of its own run, which it would become there, or a
            directory without a log is to become a run.
        InvalidCheckpoint: It is damaged; nothing was committed.
        UnsupportedStore: The target lacks exclusive create.
        CommitRefused: The target's log forbids the commit.
        CommitUnknown: The commit's outcome could not be learned in time.
        Fenced: Another process opened the target run meanwhile.
        StorageError: A store failed; nothing was committed.
    """
    started = time.monotonic()
    opened = open_checkpoint(source, located.prefix, located.manifest, trust=options.trust)
    if not located.seq and source.url == target.url:
        raise ConfigurationError(
            f"{source.url} is the directory of one checkpoint, and no run. It needs no other: "
            "there is nothing to materialize; or name a run to write into",
            option="into",
        )
    log = RunLog(target, signing=options.signing, deadline_s=options.append_deadline_s)
    history = log.refresh()
    is_own_run = history.run == opened.manifest.run
    newest = history.newest()
    if is_own_run and (newest is None or newest.record.attempt != opened.manifest.attempt):
        found = newest.record.step if newest else None
        raise ConfigurationError(
            f"step {opened.manifest.step} is not the newest checkpoint of {target.url} ({found} "
            "is): a new attempt of it would become that, and later ones would not be resumed "
            "from. Materialize the newest, or write into another run",
            option="step",
        )
    check_exclusive_create(target, f"probe/{new_attempt_id()}/")
    plan = _as_stored(opened)
    written = rewrite(
        source,
        opened,
        plan,
        _facts(opened),
        target,
        log,
        options,
    )
    committed = written.committed
    if is_own_run:
        own_run(target, log, LonelyVotes(), choose_newest, is_probed=True)
    return Materialized(
        step=committed.record.step,
        seq=committed.seq,
        prefix=written.prefix,
        num_files=len(plan.layout.names),
        num_bytes=committed.record.num_bytes,
        read_bytes=written.read_bytes,
        duration_s=time.monotonic() - started,
    )


def _as_stored(opened: OpenedCheckpoint) -> GlobalPlan:
    """The chunks as they are, in files of the ranks that wrote them.

    Of ranks that the topology does not have, because an elder was written by more, the others take
    the files over; per-rank tensors are never among these.
    """
    manifest, catalog, index = opened.manifest, opened.catalog, opened.index
    used = np.flatnonzero(index.chunk_tensor != UNUSED)
    world_size = manifest.topology.world_size
    writers = np.asarray([file.rank % world_size for file in catalog.files], np.int32)
    chunks = Table(
        index.chunk_tensor[used].astype(np.int32),
        writers[index.chunk_file[used]],
        index.chunk_box[used].astype(np.int32),
        Boxes(index.box_offsets, index.box_sizes),
    )
    return GlobalPlan(
        world_size=world_size,
        meshes=manifest.topology.meshes,
        manifest_values={leaf.fqn: (leaf.path, leaf.value) for leaf in manifest.leaves},
        num_values={name: part.num_leaves for name, part in manifest.parts.items()},
        layout=lay_out_files(chunks, catalog.tensors),
        local_ids=(),
        inline={},
    )


def _facts(opened: OpenedCheckpoint) -> Facts:
    manifest = opened.manifest
    return Facts(
        trainer=manifest.trainer,
        model=manifest.model,
        optimizer=manifest.optimizer,
        data=manifest.data,
        precision=manifest.precision,
        notes=manifest.notes,
        stages=manifest.topology.stages,
        virtual_stages=manifest.topology.virtual_stages,
    )
