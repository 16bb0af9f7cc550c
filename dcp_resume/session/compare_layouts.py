"""What a checkpoint and a state say of a tensor's shape, segments and ties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np

from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.padding import differ_in_padding, logical_shape
from dcp_resume.planning.state import LocalState
from dcp_resume.session.opening import OpenedCheckpoint

__all__ = ["compare_segments", "compare_shapes", "compare_ties"]


def compare_shapes(fqn: str, stored: TensorEntry, wanted: TensorEntry) -> Iterator[ReportItem]:
    """Whether the whole tensor has the same shape, but for padding that depends on the mesh."""
    if stored.kind == "per_rank":
        stored = stored.model_copy(update={"global_shape": stored.global_shape[1:]})
    found, expected = stored.global_shape, wanted.global_shape
    if found == expected:
        if stored.padding and wanted.padding and stored.padding != wanted.padding:
            message = (
                f"saved with padding behind {stored.padding.logical_size} rows of dim "
                f"{stored.padding.dim}, the state declares it behind {wanted.padding.logical_size} "
                f"of dim {wanted.padding.dim}"
            )
            yield ReportItem(Severity.REFUSE, "shape", fqn, message)
    elif not differ_in_padding(stored, wanted):
        message = f"saved with shape {found}, the state has {expected}"
        if logical_shape(stored) != found or logical_shape(wanted) != expected:
            message += f"; without padding {logical_shape(stored)} and {logical_shape(wanted)}"
        yield ReportItem(Severity.REFUSE, "shape", fqn, message)
    else:
        filled = prod(expected) > prod(found)
        what = "the padding beyond it is set to zero" if filled else "padding beyond it is dropped"
        message = f"saved with shape {found}, the state has {expected}, without padding "
        message += f"{logical_shape(stored)} both: {what}"
        yield ReportItem(Severity.WARN, "padding", fqn, message)


def compare_segments(
    fqn: str,
    stored: TensorEntry,
    wanted: TensorEntry,
    stored_meshes: Mapping[str, MeshEntry],
    meshes: Mapping[str, MeshEntry],
) -> Iterator[ReportItem]:
    """Whether one side knows of segments that the other cut through.

    A DTensor, and a tensor that one rank holds whole, are whole in the order that segments restore.
    """
    if stored.segments and wanted.segments:
        is_unlike = _segments(stored) != _segments(wanted)
    else:
        dims = {segment.dim for segment in stored.segments or wanted.segments or ()}
        is_unlike = bool(dims) and (
            (not stored.segments and _is_cut_blindly(stored, dims, stored_meshes))
            or (not wanted.segments and _is_cut_blindly(wanted, dims, meshes))
        )
    if is_unlike:
        message = (
            f"saved in segments {_segments(stored)} under {stored.rule}, the state declares "
            f"{_segments(wanted)} under {wanted.rule}: rows would land in other places"
        )
        yield ReportItem(Severity.REFUSE, "segments", fqn, message)


def _segments(entry: TensorEntry) -> list[tuple[str, int, int]]:
    return [(segment.name, segment.size, segment.dim) for segment in entry.segments or ()]


def _is_cut_blindly(entry: TensorEntry, dims: set[int], meshes: Mapping[str, MeshEntry]) -> bool:
    """Whether a declared layout without segments splits a dim that has some."""
    mesh = meshes.get(entry.mesh or "")
    if mesh is None or entry.placements is not None:
        return False
    sizes = dict(zip(mesh.axes, mesh.shape, strict=True))
    return any(dim in dims and sizes.get(axis, 1) > 1 for axis, dim in entry.rule.items())


def compare_ties(opened: OpenedCheckpoint, state: LocalState) -> Iterator[ReportItem]:
    """Whether the same names are one tensor in the checkpoint and in the state."""
    ids = opened.tensor_ids
    for held in state.tensors:
        fqn, first = held.entry.fqn, held.entry.alias_of
        if first is not None and fqn in ids and first in ids and ids[fqn] != ids[first]:
            if not _are_equal(opened, ids[fqn], ids[first]):
                message = (
                    f"the state ties it to {first}, the checkpoint stored both, and does not prove "
                    f"that they are equal: one would overwrite the other; untie them, or accept "
                    f"that {first} is taken"
                )
                yield ReportItem(Severity.REFUSE, "tied", fqn, message)
        elif fqn in ids and _is_untied(opened, state, held):
            stored = opened.entry(fqn).fqn
            message = f"the checkpoint ties it to {stored}, the state does not: they train apart"
            yield ReportItem(Severity.WARN, "tied", fqn, message)


def _is_untied(opened: OpenedCheckpoint, state: LocalState, held: HeldTensor) -> bool:
    """Whether memory of its own is loaded from another name's bytes, and nothing ties the two."""
    fqn = held.entry.fqn
    stored = opened.entry(fqn).fqn
    has_bytes = any(piece.box.volume for piece in held.pieces)
    return stored != fqn and has_bytes and stored not in state.ties.names(fqn)


def _are_equal(opened: OpenedCheckpoint, a: int, b: int) -> bool:
    """Whether block digests prove that two stored tensors have equal bytes in equal boxes."""
    if opened.catalog.tensors[a].dtype != opened.catalog.tensors[b].dtype:
        return False
    return (found := _proofs(opened, a)) is not None and found == _proofs(opened, b)


def _proofs(opened: OpenedCheckpoint, tensor: int) -> dict[int, bytes] | None:
    """Box of each chunk → digests of its blocks; None where a block holds other bytes too."""
    index = opened.index
    proofs: dict[int, bytes] = {}
    for chunk in index.chunks_of(tensor).tolist():
        file = int(index.chunk_file[chunk])
        box = int(index.chunk_box[chunk])
        begin = int(opened.begins[chunk])
        volume = int(np.prod(index.box_sizes[box], dtype=np.int64))
        bounds = opened.block_bounds(file)
        first, last = np.searchsorted(bounds, [begin, begin + volume * opened.itemsizes[tensor]])
        ends = (int(bounds[first]), int(bounds[min(last, len(bounds) - 1)]))
        if ends != (begin, begin + volume * int(opened.itemsizes[tensor])):
            return None
        start = int(opened.blocks.first[file])
        proofs[box] = opened.index.block_digest[start + first : start + last].tobytes()
    return proofs
