"""Merge the non-tensor leaves of all ranks: equal everywhere, or declared, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dcp_resume.errors import Problem, ReplicaMismatch, summarise
from dcp_resume.format.leaves import pack_leaves, unpack_leaves
from dcp_resume.planning.plans import SHARED_LEAVES, LocalPlan
from dcp_resume.planning.state import part_of

__all__ = ["merge_values"]

MANIFEST_LEAF_BYTES = 64 * 1024


def merge_values(
    plans: Sequence[LocalPlan],
) -> tuple[dict[str, tuple[Any, Any]], dict[str, bytes], dict[str, int]]:
    """Shared values: those for the manifest, those too many for it, and the count of each part."""
    merged: dict[str, tuple[Any, Any]] = {}
    holder: dict[str, int] = {}
    problems: list[Problem] = []
    seen: set[bytes] = set()
    for plan in plans:
        if plan.values in seen:
            continue
        seen.add(plan.values)
        for fqn, item in unpack_leaves(plan.values, f"plan of rank {plan.rank}").items():
            if fqn not in merged:
                merged[fqn], holder[fqn] = item, plan.rank
            elif merged[fqn] != item:
                message = f"rank {holder[fqn]} has {_short(merged[fqn])}, rank {plan.rank} has "
                problems.append(Problem(fqn, "replica", message + _short(item)))
    if problems:
        raise ReplicaMismatch(
            f"values differ between ranks:\n{summarise(problems)}\n"
            f"declare them per_rank, or choose one by from_rank",
            problems=tuple(problems),
        )
    by_part: dict[str, dict[str, Any]] = {}
    for fqn, (path, value) in merged.items():
        by_part.setdefault(part_of(path), {})[fqn] = (path, value)
    num_values = {part: len(values) for part, values in by_part.items()}
    packed = {part: pack_leaves(values) for part, values in by_part.items()}
    inline: dict[str, bytes] = {}
    for part in sorted(packed, key=lambda p: -len(packed[p])):
        if sum(map(len, packed.values())) - sum(map(len, inline.values())) <= MANIFEST_LEAF_BYTES:
            break
        inline[SHARED_LEAVES + part] = packed[part]
        for fqn in by_part[part]:
            del merged[fqn]
    return merged, inline, num_values


def _short(item: tuple[Any, Any]) -> str:
    text = repr(item[1])
    return text if len(text) <= 60 else text[:57] + "…"
