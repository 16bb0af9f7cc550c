"""The non-tensor leaves of an opened checkpoint, for one rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dcp_resume.errors import CorruptData
from dcp_resume.format.leaves import unpack_leaves
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.state import PER_RANK_LEAVES, SHARED_LEAVES, LocalState
from dcp_resume.problems import summarise
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.reading import read_targets
from dcp_resume.session.targets import Target
from dcp_resume.storage import ObjectStore

__all__ = ["StoredValue", "fill_empty_mappings", "own_box", "read_values", "tied_values"]

StoredValue = tuple[Sequence[Any], Any]
"""Key path and encoded value."""


def fill_empty_mappings(state: LocalState, stored: Mapping[str, StoredValue]) -> LocalState:
    """The state with what the checkpoint holds below its empty mappings.

    An object that has not begun yet often has an empty mapping (of metrics, of positions) where
    the saved one had entries; they are part of its state, not unexpected.
    """
    values = dict(state.values)
    for fqn, (path, value) in state.values.items():
        if value != {} or fqn in stored:
            continue
        below = [name for name in stored if name.startswith(f"{fqn}.")]
        if below:
            del values[fqn]
        for name in below:
            stored_path, stored_value = stored[name]
            values[name] = ((*path, *stored_path[len(path) :]), stored_value)
    return dataclasses.replace(state, values=values)


def tied_values(state: LocalState, stored: Mapping[str, StoredValue]) -> dict[str, StoredValue]:
    """Values that the checkpoint holds only under a name that is tied to the state's.

    Of a tied parameter one pipeline stage has one name, and its options; two stages have both.
    """
    found: dict[str, StoredValue] = {}
    for fqn in (*state.values, *state.per_rank_values):
        name = state.stored_name(fqn, stored)
        if name is not None and name != fqn:
            found[fqn] = stored[name]
    return found


def own_box(opened: OpenedCheckpoint, fqn: str, rank: int, world_size: int) -> Box | None:
    """Where a rank's value of a per-rank tensor lies; None on another number of ranks."""
    if opened.manifest.topology.world_size != world_size:
        return None
    tensor, index = opened.tensor_ids[fqn], opened.index
    ndim = len(opened.catalog.tensors[tensor].global_shape)
    for chunk in index.chunks_of(tensor).tolist():
        if opened.catalog.files[int(index.chunk_file[chunk])].rank == rank:
            code = index.chunk_box[chunk]
            return Box(
                tuple(index.box_offsets[code][:ndim].tolist()),
                tuple(index.box_sizes[code][:ndim].tolist()),
            )
    return None


def read_values(
    store: ObjectStore, opened: OpenedCheckpoint, *, rank: int, world_size: int
) -> dict[str, StoredValue]:
    """FQN → key path and encoded value, from the manifest and from verified data files.

    Raises:
        CorruptData: A block that holds values is damaged.
        InvalidDocument: The packed values are malformed.
        StorageError: The store failed.
    """
    values: dict[str, StoredValue] = {
        leaf.fqn: (leaf.path, leaf.value) for leaf in opened.manifest.leaves
    }
    targets: list[Target] = []
    for entry in opened.catalog.tensors:
        if entry.codec != "leaves":
            continue
        if entry.fqn.startswith(PER_RANK_LEAVES):
            box = own_box(opened, entry.fqn, rank, world_size)
        elif entry.fqn.startswith(SHARED_LEAVES):
            box = Box.whole(entry.global_shape)
        else:
            continue
        if box is not None:
            memory = memoryview(bytearray(box.volume))
            targets.append(Target(entry.fqn, box, memory, None, None))
    outcome = read_targets(store, opened, targets)
    if outcome.problems:
        raise CorruptData(
            f"values of {opened.prefix} are damaged:\n{summarise(outcome.problems)}",
            problems=tuple(outcome.problems),
        )
    for target in targets:
        values.update(unpack_leaves(bytes(target.memory), target.fqn))
    return values
