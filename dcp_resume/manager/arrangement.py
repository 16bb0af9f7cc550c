"""How the ranks were arranged at the save, and how they are now: named, and resharded.

One difference is refused. Virtual stages of a rank lie between those of other ranks, so that their
layers have gaps. Where no rank's have, layers were numbered within the rank: under another number
of virtual stages names and shapes then fit, and mean other layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch.nn import Module

from dcp_resume.manifest.models import MeshEntry, Topology
from dcp_resume.manifest.report import ReportItem, Severity

__all__ = ["arrangement_differences", "num_virtual_stages"]


def num_virtual_stages(state: Mapping[str, Any]) -> int:
    """Parts of the model that this rank holds, each of which a pipeline runs by itself."""
    parts = (
        len(value)
        for value in state.values()
        if isinstance(value, (list, tuple)) and all(isinstance(part, Module) for part in value)
    )
    return max((1, *parts))


def arrangement_differences(
    saved: Topology,
    saved_layers: Collection[int],
    meshes: Sequence[MeshEntry],
    layers: Collection[int],
    num_virtual: int,
) -> Iterator[ReportItem]:
    """Compare the arrangement of ranks in a manifest with this rank's.

    Args:
        saved: Of the checkpoint.
        saved_layers: Global indices of the layers in the checkpoint.
        meshes: Of the tensors on this rank.
        layers: Global indices of the layers on this rank, by its names.
        num_virtual: Parts of the model on this rank; virtual stages, if others hold further layers.
    """
    before, now = _axes(saved.meshes), _axes(meshes)
    for axis in sorted(before.keys() | now.keys()):
        if before.get(axis) != now.get(axis):
            message = f"saved {_over(before.get(axis))}, now {_over(now.get(axis))}: resharded"
            yield ReportItem(Severity.OK, "topology", f"topology.{axis}", message)
    stages = saved.stages or (tuple(sorted(saved_layers)),)
    if layers and tuple(sorted(layers)) not in stages:
        message = f"saved as {len(stages)} pipeline stage(s), now cut otherwise: resharded"
        yield ReportItem(Severity.OK, "topology", "topology.stages", message)
    is_part = bool(layers) and set(layers) < set(saved_layers)
    num_virtual = num_virtual if is_part else 1
    if saved.virtual_stages == num_virtual:
        return
    message = f"saved with {saved.virtual_stages} a rank, now {num_virtual}: resharded"
    yield ReportItem(Severity.OK, "topology", "topology.virtual_stages", message)
    if num_virtual > 1 and not _has_gap(layers):
        yield _numbered_within_ranks("here", num_virtual)
    if saved.virtual_stages > 1 and len(stages) > 1 and not any(map(_has_gap, stages)):
        yield _numbered_within_ranks("in the checkpoint", saved.virtual_stages)


def _axes(meshes: Sequence[MeshEntry]) -> dict[str, tuple[int, ...]]:
    """Axis of more than one rank → its sizes, more than one only where meshes share its name."""
    sizes: dict[str, set[int]] = {}
    for mesh in meshes:
        for axis, size in zip(mesh.axes, mesh.shape, strict=True):
            if size > 1:
                sizes.setdefault(axis, set()).add(size)
    return {axis: tuple(sorted(found)) for axis, found in sizes.items()}


def _over(sizes: tuple[int, ...] | None) -> str:
    return f"over {' and '.join(map(str, sizes))} ranks" if sizes else "over one"


def _has_gap(layers: Collection[int]) -> bool:
    return bool(layers) and max(layers) - min(layers) + 1 != len(set(layers))


def _numbered_within_ranks(side: str, num_virtual: int) -> ReportItem:
    message = (
        f"{side} a rank has {num_virtual} virtual stages, between which no layer of another rank "
        f"lies: layers are numbered within the rank, and would be swapped; number them over all "
        f"ranks, in the order in which a batch passes them"
    )
    return ReportItem(Severity.REFUSE, "stages", "topology.stages", message)
