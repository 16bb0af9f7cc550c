"""Merge the non-tensor leaves of all ranks: equal everywhere, or declared, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dcp_resume.errors import IncompletePlan, Problem, ReplicaMismatch
from dcp_resume.format.leaves import pack_leaves, unpack_leaves
from dcp_resume.planning.flattening import part_of
from dcp_resume.planning.state import SHARED_LEAVES, roomy_size
from dcp_resume.problems import summarise

__all__ = ["WITHHELD", "merge_values"]

WITHHELD = {"$withheld": True}
"""Stands for a value that another rank was declared to offer; no encoded leaf looks like it."""

Leaf = tuple[tuple[Any, ...], Any]
"""Key path and encoded value."""

MANIFEST_LEAF_BYTES = 64 * 1024
MAX_INDENTED_BYTES = 2 * MANIFEST_LEAF_BYTES
"""The manifest is indented for people, which makes several times as much of a list of numbers."""


def merge_values(
    offered: Sequence[bytes],
) -> tuple[dict[str, Leaf], dict[str, bytes], dict[str, int]]:
    """Merge the shared values of all ranks.

    Args:
        offered: Each rank's packed values, by rank.

    Returns:
        FQN → path and encoded value, of those that go into the manifest; FQN of a tensor → packed
        values, of the parts that are too large for it; part → number of its values.

    Raises:
        IncompletePlan: The rank that was declared to offer a value does not have it.
        ReplicaMismatch: A value differs between ranks, and nothing was declared.
    """
    merged = _unite(offered)
    by_part: dict[str, dict[str, Leaf]] = {}
    for fqn, leaf in merged.items():
        by_part.setdefault(part_of(leaf[0]), {})[fqn] = leaf
    packed = {part: pack_leaves(values) for part, values in by_part.items()}
    inline: dict[str, bytes] = {}
    left = sum(map(len, packed.values()))
    for part in sorted(packed, key=lambda name: -len(packed[name])):
        if left <= MANIFEST_LEAF_BYTES and _num_manifest_bytes(merged) <= MAX_INDENTED_BYTES:
            break
        # Filled up like a rank's own values, for the same reason.
        inline[SHARED_LEAVES + part] = packed[part].ljust(roomy_size(len(packed[part])))
        left -= len(packed[part])
        for fqn in by_part[part]:
            del merged[fqn]
    return merged, inline, {part: len(values) for part, values in by_part.items()}


def _unite(offered: Sequence[bytes]) -> dict[str, Leaf]:
    merged: dict[str, Leaf] = {}
    holder: dict[str, int] = {}
    problems: list[Problem] = []
    first: dict[bytes, int] = {}
    for rank, values in enumerate(offered):
        # Ranks of one SPMD group send equal bytes: those are read once.
        first.setdefault(values, rank)
    withheld: dict[str, None] = {}
    for values, rank in first.items():
        for fqn, leaf in unpack_leaves(values, f"plan of rank {rank}").items():
            if leaf[1] == WITHHELD:
                withheld[fqn] = None
            elif fqn not in merged:
                merged[fqn], holder[fqn] = leaf, rank
            elif merged[fqn] != leaf:
                message = f"rank {holder[fqn]} has {_short(merged[fqn])}, rank {rank} has "
                problems.append(Problem(fqn, "replica", message + _short(leaf)))
    if problems:
        raise ReplicaMismatch(
            f"values differ between ranks:\n{summarise(problems)}\n"
            f"declare them per_rank, or choose one by from_rank",
            problems=tuple(problems),
        )
    lost = tuple(
        Problem(fqn, "from_rank", "the declared rank does not have it, others do")
        for fqn in withheld
        if fqn not in merged
    )
    if lost:
        raise IncompletePlan(f"values would be lost:\n{summarise(lost)}", problems=lost)
    return merged


def _num_manifest_bytes(leaves: Mapping[str, Leaf]) -> int:
    return len(json.dumps({"leaves": list(leaves.items())}, ensure_ascii=False, indent=2))


def _short(item: Leaf) -> str:
    text = repr(item[1])
    return text if len(text) <= 60 else text[:57] + "…"
