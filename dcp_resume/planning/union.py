"""What all ranks say of each tensor, in one table; ranks that contradict each other are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import IncompletePlan, Problem
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.plan_check import check_listed
from dcp_resume.planning.plans import PlanShape, decode_structure
from dcp_resume.problems import summarise

__all__ = ["Union", "unite"]


@dataclass(frozen=True, slots=True)
class Union:
    """The tensors of all ranks."""

    tensors: tuple[TensorEntry, ...]
    meshes: Mapping[str, MeshEntry]
    global_ids: Mapping[bytes, list[int]]
    """Structure → per local tensor its position in ``tensors``."""
    is_own: npt.NDArray[np.bool_]
    """``[tensors]`` whether some rank holds bytes of it that are no other tensor's."""


_COMPARED = ("dtype", "global_shape", "part", "path", "codec", "segments", "padding")


def unite(plans: Sequence[PlanShape]) -> Union:
    """Unite the structures of all ranks.

    Raises:
        IncompletePlan: Ranks contradict each other about a tensor.
        InvalidDocument: A rank names a tensor that it does not list.
    """
    tensors: list[TensorEntry] = []
    ids: dict[str, int] = {}
    meshes: dict[str, MeshEntry] = {}
    global_ids: dict[bytes, list[int]] = {}
    own: dict[bytes, npt.NDArray[np.bool_]] = {}
    problems: list[Problem] = []
    for plan in plans:
        if plan.structure in global_ids:
            continue
        entries, plan_meshes = decode_structure(plan.structure)
        meshes.update((mesh.id, mesh) for mesh in plan_meshes)
        global_ids[plan.structure] = row = []
        own[plan.structure] = np.asarray([entry.alias_of is None for entry in entries], bool)
        for entry in entries:
            known = ids.setdefault(entry.fqn, len(tensors))
            if known == len(tensors):
                tensors.append(entry)
            row.append(known)
            problems.extend(_contradictions(tensors[known], entry, plan.rank))
            tensors[known] = _united(tensors[known], entry)
    if problems:
        raise IncompletePlan(
            f"ranks contradict each other:\n{summarise(problems)}\n"
            f"give different tensors different names (pipeline stages: global layer names), and "
            f"declare the same layouts on every rank",
            problems=tuple(problems),
        )
    num_tensors = [len(global_ids[plan.structure]) for plan in plans]
    counts = [len(plan.tensor) for plan in plans]
    check_listed(np.concatenate([plan.tensor for plan in plans]), num_tensors, counts, "a tensor")
    held = {structure: np.zeros(len(row), bool) for structure, row in global_ids.items()}
    for plan in plans:
        # A rank whose shard is empty cannot tell that it is tied, and has no say.
        held[plan.structure][plan.tensor] = True
    is_own = np.zeros(len(tensors), bool)
    for structure, row in global_ids.items():
        is_own[np.asarray(row, np.int64)[held[structure] & own[structure]]] = True
    return Union(tuple(tensors), meshes, global_ids, is_own)


def _united(known: TensorEntry, entry: TensorEntry) -> TensorEntry:
    best = entry if known.kind == "replicated" and entry.kind == "sharded" else known
    alias = known.alias_of or entry.alias_of
    return best if best.alias_of == alias else best.model_copy(update={"alias_of": alias})


def _contradictions(known: TensorEntry, entry: TensorEntry, rank: int) -> list[Problem]:
    per_rank = "per_rank" in (known.kind, entry.kind)
    return [
        Problem(
            entry.fqn,
            name,
            f"rank {rank} says {getattr(entry, name)!r}, a rank before it {getattr(known, name)!r}",
        )
        for name in (*_COMPARED, *(("kind",) if per_rank else ()))
        if getattr(entry, name) != getattr(known, name)
    ]
