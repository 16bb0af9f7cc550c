"""``digest_tensors``: the digests of a live state, to compare states on different topologies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dcp_resume.errors import IncompletePlan, ReplicaMismatch
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manager.stateful import bind_state, declarations_of
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.padding import logical_shape
from dcp_resume.planning.state import LocalState, describe_state
from dcp_resume.problems import summarise
from dcp_resume.session.held_tensors import HeldMemory, HeldTotals, digest_held
from dcp_resume.session.ranks import Ranks

__all__ = ["digest_tensors"]


def digest_tensors(
    state: Mapping[str, Any],
    *,
    declarations: Declarations | None = None,
    deadline_s: float = 1800.0,
) -> dict[str, str]:
    """The digest of every tensor that the ranks hold together, however it is cut.

    Call it on every rank. Two states are equal, bit for bit, if their digests are (but for the
    chance that two different tensors have one digest), whatever ranks hold them.

        >>> import torch
        >>> weights = torch.arange(6.0)
        >>> digest_tensors({"model": {"w": weights}}) == digest_tensors({"model": {"w": weights}})
        True

    Args:
        state: As for ``CheckpointManager.save``.
        declarations: What torch does not say of its leaves.
        deadline_s: Seconds after which it fails on every rank that still waits for another.

    Returns:
        FQN → 32 hex digits, alike on every rank and as a save records them. A tensor of several
        names has its digest under each. Values, and tensors that belong to one rank, have none.

    Raises:
        ConfigurationError: A declaration cannot work.
        StateError: The state cannot be described; ``ReplicaMismatch`` where ranks hold different
            copies, ``IncompletePlan`` where elements are missing.
        RankErrors: A rank failed.
        RankSilent: A rank did not answer by the deadline.
    """
    declared = declarations_of(declarations or Declarations(), state)
    votes = Ranks().votes(step=0, deadline_s=deadline_s)
    described: list[LocalState] = []

    def describe() -> bytes:
        bound = bind_state(state)
        try:
            described.append(describe_state(bound.state_dict(), declared))
        finally:
            bound.undo()
        described[0].check_place(votes.rank, votes.world_size)
        return b""

    votes.round("describe", describe, lambda ballots: [b""] * len(ballots))
    held = _held(described[0], declared, votes.rank)
    found: dict[str, str] = json.loads(digest_held(votes, held, _by_name))
    return found


def _held(state: LocalState, declarations: Declarations, rank: int) -> list[HeldMemory]:
    distinct = {held.entry.fqn for held in state.distinct_tensors()}
    held: list[HeldMemory] = []
    for tensor in state.tensors:
        entry = tensor.entry
        if entry.kind == "per_rank":
            continue
        is_asked = entry.fqn in distinct and declarations.source_rank(entry.fqn) in (None, rank)
        held.append(
            HeldMemory(
                entry.alias_of or entry.fqn,
                (entry.fqn,),
                logical_shape(entry),
                ITEMSIZES[entry.dtype],
                tensor.pieces if is_asked else (),
            )
        )
    return held


def _by_name(totals: HeldTotals) -> bytes:
    torn = tuple(problem for problem in totals.problems if problem.kind == "replica")
    if torn:
        raise ReplicaMismatch(
            f"tensors taken for replicas differ between ranks:\n{summarise(torn)}\n"
            f"declare them per_rank, choose one by from_rank, or declare how they are cut",
            problems=torn,
        )
    if totals.problems:
        raise IncompletePlan(
            f"the ranks together do not hold every tensor:\n{summarise(totals.problems)}\n"
            f"check that every rank hands in its state",
            problems=tuple(totals.problems),
        )
    names = sorted(totals.first_names.items())
    return json.dumps({name: totals.digests[first].hex for name, first in names}).encode()
