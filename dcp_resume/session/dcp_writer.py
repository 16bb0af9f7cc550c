"""DCP's StorageWriter over a run of ours: ``dcp.save(state, storage_writer=Writer(url, step=n))``.

Two ways for the ranks to agree:

* ``votes="dcp"``: plans, reports and errors travel in DCP's own collectives, so the deadline is the
  process group's time-out. For ``dcp.save``.
* ``votes="store"``: everything goes over an own store, as in ``CheckpointManager``; DCP runs no
  collective. For ``dcp.async_save(…, no_dist=True)`` and ``dcp.save(…, no_dist=True)``.

Works with our planner and with stock ones. No leaf is ever pickled: with a stock planner, values
are taken from ``planner.lookup_object`` and encoded here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from dcp_resume.errors import ConfigurationError
from dcp_resume.events import CheckpointCommitted, emit
from dcp_resume.format.data_file import ChunkHeader
from dcp_resume.format.dtypes import dtype_info
from dcp_resume.format.leaves import encode_leaf, pack_leaves, unpack_leaves
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry, TrainerFacts
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.planning.dcp_items import box_of_item, items_to_columns
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.merge import merge
from dcp_resume.planning.plans import LocalPlan, RankPlan
from dcp_resume.planning.save_planner import ColumnarStorageMeta, columns_of
from dcp_resume.planning.save_planner import SavePlanner as OurSavePlanner
from dcp_resume.session.attempt import Attempt, Order
from dcp_resume.session.chunk_sources import ChunkSource, RankSource
from dcp_resume.session.device_copies import prompt_copies
from dcp_resume.session.documents import Facts
from dcp_resume.session.incarnation import incarnation_of
from dcp_resume.session.placed_files import PlacedChunk, PlacedFiles
from dcp_resume.session.save import SaveResult, SaveSession
from dcp_resume.session.staging import Borrowed, Buffered, snapshot
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.writing import RankReport, stage_rank, write_rank

__all__ = ["Writer"]


class Writer(StorageWriter):
    """Writes one checkpoint of the run at ``url``.

    Args:
        url: Root of the run.
        step: Optimizer steps completed.
        votes: How the ranks agree; see the module.
        own_group: Says that ``async_save`` gets a process group of its own, which makes
            ``votes="dcp"`` safe there.
        facts: For the manifest.
        declarations: With ``votes="store"``: what the caller knows of its leaves.
        tensor_digests: Whether to record a digest of each tensor.
        storage_options: Passed to the file system.
        signing: How documents are signed, and whose are believed.
        deadline_s: With ``votes="store"``: seconds until the save fails on every rank.

    Raises:
        ConfigurationError: An unknown ``votes``, a negative step, an unknown URL scheme.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        step: int,
        votes: Literal["dcp", "store"] = "dcp",
        own_group: bool = False,
        facts: Facts | None = None,
        declarations: Declarations | None = None,
        tensor_digests: TensorDigests = TensorDigests.OMIT,
        storage_options: Mapping[str, Any] | None = None,
        signing: Signing = UNSIGNED,
        deadline_s: float = 1800.0,
    ) -> None:
        if votes not in ("dcp", "store"):
            raise ConfigurationError(
                f"votes must be 'dcp' or 'store', got {votes!r}", option="votes"
            )
        if step < 0:
            raise ConfigurationError(f"step must not be negative, got {step}", option="step")
        self._url = os.fspath(url)
        self._step = step
        self._votes = votes
        self._own_group = own_group
        self._facts = facts or Facts(TrainerFacts(step=step))
        self._declarations = declarations
        self._tensor_digests = tensor_digests
        self._storage_options = dict(storage_options or {})
        self._signing = signing
        self._deadline_s = deadline_s
        self._session: SaveSession | None = None
        self._attempt: Attempt | None = None
        self.result: SaveResult | None = None
        """The committed checkpoint; with ``votes="dcp"`` on the coordinator only."""

    # Staging, in the thread that called ``async_save``.

    _synchronize_after_execute = False
    """DCP takes an object for a stager only if it has this member of its protocol."""

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Nothing is left to wait for: ``stage`` returns when the copy is complete."""
        return self._synchronize_after_execute

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Agree and copy the state into host buffers, before ``async_save`` returns.

        Returns:
            With ``votes="store"`` the state dict itself: what is written comes from the buffers.
            With a group of its own, a copy of the state.

        Raises:
            ConfigurationError: DCP's collectives would run in the background on the trainer's
                process group, which deadlocks or corrupts both.
            SaveError: The ranks did not agree.
            StateError: The state cannot be saved as it is.
        """
        if self._votes == "dcp":
            if self._own_group:
                return dict(snapshot(state_dict))
            raise ConfigurationError(
                "async_save would run DCP's collectives in a thread beside the trainer's. Use "
                "dcp.async_save(…, no_dist=True, storage_writer=Writer(…, votes='store')), or pass "
                "a process_group made for this alone and say so by own_group=True",
                option="votes",
            )
        incarnation = incarnation_of(self._url, self._storage_options, self._signing)
        self._begin_session().stage(state_dict, Buffered(incarnation.pool))
        return state_dict

    def synchronize_staging(self) -> None:
        """Nothing to do; see ``should_synchronize_after_execute``."""

    def close(self) -> None:
        """End of a stager's life; the buffers stay with the run."""

    def _begin_session(self) -> SaveSession:
        incarnation = incarnation_of(self._url, self._storage_options, self._signing)
        first = incarnation.votes(step=self._step, deadline_s=self._deadline_s)
        run = incarnation.own(first)
        self._session = SaveSession(
            run,
            incarnation.votes(step=self._step, deadline_s=self._deadline_s),
            step=self._step,
            facts=self._facts,
            declarations=self._declarations,
            tensor_digests=self._tensor_digests,
            memory=incarnation.memory,
        )
        return self._session

    # DCP's calls, in their order.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins.

        Raises:
            ConfigurationError: ``checkpoint_id`` was given; a writer knows its place already.
        """
        if checkpoint_id is not None:
            raise ConfigurationError(
                f"checkpoint_id={os.fspath(checkpoint_id)!r} does not go with Writer(url, step=…); "
                f"drop it",
                option="checkpoint_id",
            )

    def storage_meta(self) -> ColumnarStorageMeta | None:
        """Tell our planner that it may plan in columns."""
        return ColumnarStorageMeta() if self._votes == "dcp" else None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the role.

        Raises:
            ConfigurationError: DCP was told to save without the other ranks, but votes go by DCP.
        """
        del args
        self._attempt = None
        if self._votes == "store":
            return
        told = int(kwargs.get("rank", 0))
        actual = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if told != actual or not kwargs.get("use_collectives", True):
            raise ConfigurationError(
                f"rank {actual} is told that it is rank {told} of a save without collectives; the "
                f"other ranks' state would be lost. Use Writer(…, votes='store')",
                option="votes",
            )
        if is_coordinator:
            incarnation_of(self._url, self._storage_options, self._signing).own()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin the attempt (coordinator), and give each rank its order.

        Raises:
            StateError: The plans contradict each other or do not tile every tensor.
            StorageError: The store failed.
        """
        if self._votes == "store":
            return plans
        run = incarnation_of(self._url, self._storage_options, self._signing).own()
        entries: dict[str, TensorEntry] = {}
        columns: list[LocalPlan] = []
        for rank, plan in enumerate(plans):
            columns.append(columns_of(plan) or items_to_columns(plan, rank, len(plans), entries))
        merged = merge(columns)
        self._attempt = Attempt.begin(run, merged, self._step, self._tensor_digests)
        order = self._attempt.order.to_bytes()
        return [
            SavePlan(plan.items, storage_data=order + merged.rank_plan(rank).to_bytes())
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, and report them.

        Raises:
            StorageError: The store refused a file.
            UnsupportedLeaf: A value that is never stored.
            SaveError: With ``votes="store"``: the save did not commit.
        """
        results: Future[list[WriteResult]] = Future()
        incarnation = incarnation_of(self._url, self._storage_options, self._signing)
        if self._votes == "store":
            session = self._session
            if session is None:
                session = self._begin_session()
                session.stage(_nested_state(planner), Borrowed(incarnation.pool))
            self._session = None
            self.result = session.finish()
            results.set_result([])
            return results
        order = Order.from_bytes(plan.storage_data)
        rank_plan = RankPlan.from_bytes(plan.storage_data[Order.NUM_BYTES :])
        source, values = _source(plan, planner)
        with ExitStack() as ending:
            copies = prompt_copies()
            ending.callback(copies.abandon)  # a device must not write on into what is let go
            staged = stage_rank(rank_plan, source, Borrowed(incarnation.pool), copies)
            copies.finish()
            ending.callback(staged.release)
            num_bytes = staged.num_bytes
            report = write_rank(
                staged,
                incarnation.store,
                order.prefix,
                order.block_size,
                order.algorithm,
                order.tensor_digests,
            )
        data = [report.to_bytes(), pack_leaves(values)]
        results.set_result([WriteResult(MetadataIndex("~report"), num_bytes, data)])
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit (coordinator).

        Empties ``metadata``, which DCP would otherwise send to every rank.

        Raises:
            SaveError: The save did not commit.
            StorageError: The store failed; the save did not commit.
        """
        if self._votes == "store":
            return
        assert self._attempt is not None
        reports: list[RankReport] = []
        values: dict[str, tuple[Any, Any]] = {}
        for rank, (result,) in enumerate(results):
            report, leaves = result.storage_data
            reports.append(RankReport.from_bytes(report))
            values.update(unpack_leaves(leaves, f"values of rank {rank}"))
        committed = self._attempt.commit(reports, self._facts, values)
        self._attempt = None
        metadata.state_dict_metadata = {}
        metadata.planner_data = metadata.storage_data = None
        record = committed.record
        self.result = SaveResult(self._step, committed.seq, record.attempt, record.num_bytes, 0.0)
        emit(
            CheckpointCommitted(
                url=self._url,
                step=self._step,
                attempt=record.attempt,
                num_bytes=record.num_bytes,
                duration_s=0.0,
            )
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never picked by a URL alone: a step is needed too."""
        del checkpoint_id
        return False


class _PlannerSource:
    """Takes bytes from a stock planner, item by item."""

    def __init__(self, items: Sequence[WriteItem], planner: SavePlanner) -> None:
        self._planner = planner
        self._items: dict[str, dict[Box, WriteItem]] = {}
        for item in items:
            self._items.setdefault(item.index.fqn, {})[box_of_item(item)] = item

    def collect(self, plan: RankPlan) -> tuple[PlacedFiles, Sequence[torch.Tensor]]:
        """The planned files, and the memory of each chunk, in the order of the plan."""
        views: list[torch.Tensor] = []
        chunks: list[PlacedChunk] = []
        items = list(self._items.values())
        for local, fqn, key, offsets, sizes in plan.rows(list(self._items)):
            own = items[local]
            ndim = len(next(iter(own)).sizes)
            box = Box(tuple(offsets[:ndim]), tuple(sizes[:ndim]))
            tensor = self._planner.resolve_data(own[box])
            assert isinstance(tensor, torch.Tensor)
            dtype = dtype_info(tensor.dtype).name
            data = own[box].tensor_data
            assert data is not None
            line = ChunkHeader(key, dtype, box.sizes, box.offsets)
            views.append(tensor)
            chunks.append(PlacedChunk(fqn, line, tuple(data.size)))
        return PlacedFiles.of(plan, chunks), views


def _source(plan: SavePlan, planner: SavePlanner) -> tuple[ChunkSource, dict[str, Any]]:
    """Where this rank's bytes come from, and the values it encodes itself."""
    if isinstance(planner, OurSavePlanner) and planner.local_state is not None:
        state = planner.local_state
        return RankSource(state.tensors, state.per_rank_leaves), {}
    values: dict[str, Any] = {}
    tensors: list[WriteItem] = []
    for item in plan.items:
        if item.type != WriteItemType.BYTE_IO:
            tensors.append(item)
            continue
        fqn = item.index.fqn
        if not hasattr(planner, "lookup_object"):
            raise ConfigurationError(
                f"{fqn} is no tensor, and {type(planner).__name__} has no lookup_object to hand it "
                f"over without pickle; use dcp_resume.SavePlanner",
                option="planner",
            )
        values[fqn] = (_path(planner, fqn), encode_leaf(planner.lookup_object(item.index), fqn))
    return _PlannerSource(tensors, planner), values


def _nested_state(planner: Any) -> dict[str, Any]:
    """The state that a planner was set up with, before it was flattened."""
    if isinstance(planner, OurSavePlanner) and planner.local_state is not None:
        return planner.original_state_dict
    nested: dict[str, Any] = {}
    for fqn, value in planner.state_dict.items():
        *parents, last = _path(planner, fqn)
        place = nested
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return nested


def _path(planner: Any, fqn: str) -> tuple[Any, ...]:
    path = getattr(planner, "mappings", {}).get(fqn)
    return tuple(path) if path is not None else (fqn,)
