"""DCP's StorageReader over one of our runs: ``dcp.load(state, storage_reader=Reader(url))``.

Works with our planner and with stock ones, with any number of ranks and with ``no_dist=True``.
Every block is verified before it enters a tensor. Values are set in the planner's own state dict;
nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcp_resume.errors import (
    CheckpointNotFound,
    ConfigurationError,
    CorruptData,
    DcpResumeError,
    KeyNotFound,
    LoadRefused,
    PartialLoad,
    Problem,
)
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.format.leaves import decode_leaf
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.keys import MANIFEST_NAME
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.problems import summarise
from dcp_resume.session.device_loads import fill
from dcp_resume.session.incarnation import incarnation_of
from dcp_resume.session.located import Located
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.targets import Apply, DeviceTarget, Target, settle, target_of
from dcp_resume.session.values import StoredValue, read_values
from dcp_resume.storage import ObjectStore

__all__ = ["Reader"]


class _TensorMetadata(dict[str, Any]):
    """DCP's metadata of each FQN, built when asked for: a rank needs a few of very many."""

    def __init__(self, opened: OpenedCheckpoint, values: Mapping[str, StoredValue]) -> None:
        tensors = [e.fqn for e in opened.catalog.tensors if e.codec == "raw"]
        super().__init__(dict.fromkeys((*tensors, *values)))
        self._opened, self._values = opened, values

    def __getitem__(self, fqn: str) -> TensorStorageMetadata | BytesStorageMetadata:
        found = super().__getitem__(fqn)
        if found is None:
            found = BytesStorageMetadata() if fqn in self._values else self._build(fqn)
            self[fqn] = found
        return found  # type: ignore[no-any-return]

    def get(self, fqn: str, default: Any = None) -> Any:
        return self[fqn] if fqn in self else default  # noqa: SIM401 (this is what get is)

    def items(self) -> Any:
        return ((fqn, self[fqn]) for fqn in self)

    def values(self) -> Any:
        return (self[fqn] for fqn in self)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def _build(self, fqn: str) -> TensorStorageMetadata:
        opened = self._opened
        tensor, index = opened.tensor_ids[fqn], opened.index
        entry = opened.catalog.tensors[tensor]
        ndim = len(entry.global_shape)
        codes = index.chunk_box[index.chunks_of(tensor)]
        chunks = [
            ChunkStorageMetadata(torch.Size(offsets[:ndim]), torch.Size(sizes[:ndim]))
            for offsets, sizes in zip(
                index.box_offsets[codes].tolist(), index.box_sizes[codes].tolist(), strict=True
            )
        ]
        return TensorStorageMetadata(
            TensorProperties(dtype=DTYPES[entry.dtype].torch_dtype),
            torch.Size(entry.global_shape),
            chunks,
        )


class Reader(StorageReader):
    """Reads one checkpoint of the run at ``url``.

    Args:
        url: Root of the run, or the directory of one checkpoint that was copied without its log.
        step: A step, or ``latest``.
        storage_options: Passed to the file system.
        signing: How documents are signed, and whose are believed.

    Raises:
        ConfigurationError: An unknown URL scheme.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        step: int | Literal["latest"] = "latest",
        storage_options: Mapping[str, Any] | None = None,
        signing: Signing = UNSIGNED,
    ) -> None:
        self._url = os.fspath(url)
        self._step = step
        self._storage_options = dict(storage_options or {})
        self._signing = signing
        self._opened: OpenedCheckpoint | None = None
        self._located: Located | None = None
        self._values: dict[str, StoredValue] = {}
        self._failure: Exception | None = None

    @property
    def opened(self) -> OpenedCheckpoint:
        """The documents; known after ``read_metadata``."""
        assert self._opened is not None
        return self._opened

    # DCP's calls, in their order.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins.

        Raises:
            ConfigurationError: ``checkpoint_id`` was given; a reader knows its place already.
        """
        if checkpoint_id is not None:
            raise ConfigurationError(
                f"checkpoint_id={os.fspath(checkpoint_id)!r} does not go with Reader(url); drop it",
                option="checkpoint_id",
            )

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Open and prove the documents.

        Never raises: DCP would call it again and turn the error into the text of an AssertionError.
        ``set_up_storage_reader`` raises what was found.
        """
        del args, kwargs
        self._failure = None
        try:
            self._open()
        except DcpResumeError as error:
            self._failure = error
            return Metadata({})
        paths = {entry.fqn: _plain_path(entry.path) for entry in self.opened.catalog.tensors}
        paths.update((fqn, _plain_path(path)) for fqn, (path, _) in self._values.items())
        return Metadata(_TensorMetadata(self.opened, self._values), planner_data=paths)

    def _open(self) -> None:
        incarnation = incarnation_of(self._url, self._storage_options, self._signing)
        history = incarnation.log.refresh()
        entry = history.newest() if self._step == "latest" else history.find_step(self._step)
        if entry is None and (history.last_seq or not _is_checkpoint(incarnation.store)):
            raise CheckpointNotFound(
                f"{self._url} has no usable checkpoint for {self._step!r}",
                url=self._url,
                request=str(self._step),
            )
        self._located = Located.of(entry) if entry else Located(0, "", None)
        self._opened = open_checkpoint(
            incarnation.store,
            self._located.prefix,
            self._located.manifest,
            trust=self._signing.trust,
        )
        is_alone = not (dist.is_available() and dist.is_initialized())
        self._values = read_values(
            incarnation.store,
            self._opened,
            rank=0 if is_alone else dist.get_rank(),
            world_size=1 if is_alone else dist.get_world_size(),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Raise what ``read_metadata`` found.

        Raises:
            CheckpointNotFound: No committed checkpoint answers the request.
            InvalidCheckpoint: The documents are damaged.
            StorageError: The store failed.
        """
        del metadata, is_coordinator, args, kwargs
        if self._failure is not None:
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say which manifest this rank read."""
        manifest = self.opened.manifest
        identity = (manifest.step, manifest.attempt, manifest.catalog.digest)
        return dataclasses.replace(plan, storage_data=identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse ranks that read different checkpoints.

        Raises:
            LoadRefused: A commit came between two ranks' looks at the log.
        """
        problems = tuple(
            Problem(
                f"rank {rank}",
                "checkpoint",
                f"reads step {plan.storage_data[0]} (attempt {plan.storage_data[1]}), rank 0 reads "
                f"step {plans[0].storage_data[0]} (attempt {plans[0].storage_data[1]})",
            )
            for rank, plan in enumerate(plans)
            if plan.storage_data != plans[0].storage_data
        )
        if problems:
            raise LoadRefused(
                f"ranks read different checkpoints:\n{summarise(problems)}\nload again, or name a "
                f"step",
                problems=problems,
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, and set its values.

        Raises:
            LoadRefused: A tensor has another dtype than was saved; nothing was changed.
            PartialLoad: Blocks failed after tensors were written; they are listed.
            CorruptData: Blocks failed before any tensor was written.
            StorageError: The store failed.
        """
        items = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        tensors = [planner.resolve_tensor(item).detach() for item in items]
        self._check_dtypes(items, tensors)
        targets = [
            target_of(item.storage_index.fqn, _stored_box(item), tensor, Apply.IN_PLACE)
            for item, tensor in zip(items, tensors, strict=True)
        ]
        self._read(targets)
        for item, tensor in zip(items, tensors, strict=True):
            planner.commit_tensor(item, tensor)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                self._set_value(item.dest_index.fqn, item.storage_index.fqn, planner)
        assert self._located is not None
        incarnation = incarnation_of(self._url, self._storage_options, self._signing)
        incarnation.loaded_seq = self._located.seq or None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check_dtypes(self, items: list[ReadItem], tensors: list[torch.Tensor]) -> None:
        problems: list[Problem] = []
        for item, tensor in zip(items, tensors, strict=True):
            fqn = item.storage_index.fqn
            stored = self.opened.catalog.tensors[self.opened.tensor_ids[fqn]].dtype
            found = str(tensor.dtype).removeprefix("torch.")
            if stored != found:
                problems.append(Problem(fqn, "dtype", f"saved as {stored}, the state has {found}"))
        if problems:
            raise LoadRefused(
                f"dtypes differ; nothing was changed:\n{summarise(problems)}",
                problems=tuple(problems),
            )

    def _read(self, targets: list[Target | DeviceTarget]) -> None:
        store = incarnation_of(self._url, self._storage_options, self._signing).store
        outcome = fill(store, self.opened, targets)
        if not outcome.problems:
            settle(targets)
            return
        text = f"step {self.opened.manifest.step} is damaged:\n{summarise(outcome.problems)}"
        problems = tuple(outcome.problems)
        if outcome.written_fqns:
            written = tuple(sorted(outcome.written_fqns))
            raise PartialLoad(
                f"{text}\n{len(written)} tensor(s) were already written; load an older step",
                written_fqns=written,
                problems=problems,
            )
        raise CorruptData(f"{text}\nno tensor was changed", problems=problems)

    def _set_value(self, fqn: str, stored_fqn: str, planner: Any) -> None:
        if not hasattr(planner, "mappings") or not hasattr(planner, "original_state_dict"):
            raise ConfigurationError(
                f"{fqn} is no tensor, and {type(planner).__name__} has no original_state_dict and "
                f"mappings to set it by; use dcp_resume.LoadPlanner",
                option="planner",
            )
        value = decode_leaf(self._values[stored_fqn][1], stored_fqn)
        place, path = planner.original_state_dict, planner.mappings[fqn]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never picked by a URL alone."""
        del checkpoint_id
        return False


def _is_checkpoint(store: ObjectStore) -> bool:
    """Whether the store's root is the directory of one checkpoint, copied without its log."""
    try:
        return store.size(MANIFEST_NAME) > 0
    except KeyNotFound:
        return False


def _plain_path(path: Any) -> tuple[Any, ...]:
    return tuple(key["key"] if isinstance(key, dict) else key for key in path)


def _stored_box(item: ReadItem) -> Box:
    base = item.storage_index.offset or (0,) * len(item.lengths)
    offsets = tuple(a + b for a, b in zip(base, item.storage_offsets, strict=True))
    return Box(offsets, tuple(item.lengths))
