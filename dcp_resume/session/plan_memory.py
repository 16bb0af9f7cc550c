"""How ranks and coordinator agree on a plan: in full, or by reference to the last one.

A rank whose plan has the shape of the last agreement sends the fingerprint of what was agreed, and
contents. The coordinator answers by reference too, if its last plan has this fingerprint and every
rank sent it. If it is not so, all ranks are asked to tell their plans in full: nobody plans by what
another may have forgotten, and a save that failed leaves nothing behind that counts.

The structure of a plan, its longest part, is as a rule the same on all ranks. So the coordinator's
own ballot spells it out, and those of others name it by its digest; if it is another, all ranks are
asked to tell their plans in full.

ballot: ``=`` fingerprint contents · ``~`` digest plan-without-structure · ``+`` plan
answer: ``=`` fingerprint values · ``+`` fingerprint length plan values · ``?``
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.format.digests import DIGEST_BYTES
from dcp_resume.planning.local_plans import OfferMemory
from dcp_resume.planning.merge import GlobalPlan, MergeMemory
from dcp_resume.planning.outline import OutlineMemory
from dcp_resume.planning.plans import (
    LocalPlan,
    PlanContents,
    RankPlan,
    Structures,
    pack_inline,
    unpack_inline,
)
from dcp_resume.session.chunk_sources import PlacedMemory

__all__ = ["TELL_ALL", "PlanMemory"]

_SAME, _BRIEF, _NEW = b"=", b"~", b"+"
TELL_ALL = b"?"
"""The answer to a rank that is to tell its plan in full."""


@dataclass(frozen=True, slots=True)
class _Agreed:
    """What a rank writes, and for which shape of its own plan that was said."""

    shape: bytes
    """Fingerprint of the rank's plan."""
    plan: bytes
    """Fingerprint of all ranks' plan."""
    rank_plan: RankPlan
    """Without the values that it writes."""
    placed: PlacedMemory = field(default_factory=PlacedMemory)
    """Of the rank's plan."""


@dataclass(slots=True)
class PlanMemory:
    """What the owner of a run remembers of its plans, on one rank. It keeps no tensor alive."""

    outline: OutlineMemory = field(default_factory=OutlineMemory)
    offer: OfferMemory = field(default_factory=OfferMemory)
    _merge: MergeMemory = field(default_factory=MergeMemory)
    _agreed: _Agreed | None = None

    def ballot(self, plan: LocalPlan) -> bytes:
        """What this rank says of its plan."""
        agreed = self._agreed
        if agreed is None or agreed.shape != plan.shape.fingerprint:
            return _brief_ballot(plan) if plan.shape.rank else self.full_ballot(plan)
        return _SAME + agreed.plan + plan.contents.to_bytes()

    def full_ballot(self, plan: LocalPlan) -> bytes:
        """The same, to a coordinator that knows nothing."""
        return _NEW + plan.to_bytes()

    def learn(self, answer: bytes, plan: LocalPlan) -> RankPlan:
        """Take the coordinator's answer; this rank's part of the plan.

        Raises:
            InvalidDocument: It refers to a plan that this rank does not have.
        """
        fingerprint, body = answer[1 : 1 + DIGEST_BYTES], answer[1 + DIGEST_BYTES :]
        if answer[:1] == _NEW:
            end = 8 + int.from_bytes(body[:8], "little")
            rank_plan, body = RankPlan.from_bytes(body[8:end]), body[end:]
            self._agreed = _Agreed(plan.shape.fingerprint, fingerprint, rank_plan)
        known = self._agreed
        if known is None or (known.shape, known.plan) != (plan.shape.fingerprint, fingerprint):
            message = (
                f"the coordinator refers to plan {fingerprint.hex()}, this rank remembers "
                f"{known.plan.hex() if known else 'none'}"
            )
            raise InvalidDocument(
                f"{message}; make a new manager on every rank",
                problems=(Problem("plan", "reference", message),),
            )
        return replace(known.rank_plan, inline=unpack_inline(body))

    @property
    def placed(self) -> PlacedMemory:
        """Of the plan that was learned last."""
        return self._agreed.placed if self._agreed else PlacedMemory()

    @staticmethod
    def is_remembered(answer: bytes) -> bool:
        """Whether the coordinator refers to a plan that was agreed in an earlier save."""
        return answer[:1] == _SAME

    # The coordinator.

    def can_merge(self, ballots: Sequence[bytes]) -> bool:
        """Whether the ranks' ballots, together with what is remembered, say all."""
        kinds = {ballot[:1] for ballot in ballots}
        named = {ballot[1 : 1 + DIGEST_BYTES] for ballot in ballots if ballot[:1] != _NEW}
        if kinds == {_SAME}:
            return named == {self._merge.fingerprint}
        return _SAME not in kinds and (not named or named <= _structures(ballots).keys())

    def merge(self, ballots: Sequence[bytes]) -> GlobalPlan:
        """Merge the plans of ballots that say all.

        Raises:
            IncompletePlan: Ranks contradict each other about a tensor, or the chunks of one do not
                tile it.
            InvalidDocument: A ballot is malformed.
            ReplicaMismatch: Assumed replicas, tied tensors, or values without a declaration differ.
        """
        if ballots[0][:1] != _SAME:
            return self._merge.merge(_plans(ballots))
        return self._merge.renew(
            [PlanContents.from_bytes(ballot[1 + DIGEST_BYTES :]) for ballot in ballots]
        )

    def answers(self, ballots: Sequence[bytes], plan: GlobalPlan) -> list[bytes]:
        """What to tell the ranks of the plan, which was merged last, from these ballots."""
        inline = pack_inline(plan.inline)
        nothing = pack_inline({})
        same = _SAME + self._merge.fingerprint
        if all(ballot.startswith(same) for ballot in ballots):
            return [same + inline, *[same + nothing] * (len(ballots) - 1)]
        answers: list[bytes] = []
        for rank in range(len(ballots)):
            rank_plan = plan.rank_plan(rank)
            part = (rank_plan if rank else replace(rank_plan, inline={})).to_bytes()
            head = _NEW + self._merge.fingerprint + len(part).to_bytes(8, "little")
            answers.append(head + part + (nothing if rank else inline))
        return answers


def _brief_ballot(plan: LocalPlan) -> bytes:
    brief = replace(plan, shape=replace(plan.shape, structure=b""))
    return _BRIEF + plan.shape.structure_digest + brief.to_bytes()


def _structures(ballots: Sequence[bytes]) -> dict[bytes, bytes]:
    """Digest → structure, of the ballots that spell one out."""
    shapes = (LocalPlan.from_bytes(b[1:]).shape for b in ballots if b[:1] == _NEW)
    return {shape.structure_digest: shape.structure for shape in shapes}


def _plans(ballots: Sequence[bytes]) -> list[LocalPlan]:
    """The plans of ballots that say all, by rank."""
    is_spelt_out = all(ballot[:1] == _NEW for ballot in ballots)
    named = {} if is_spelt_out else _structures(ballots)
    known, plans = Structures(), list[LocalPlan]()
    for ballot in ballots:
        if ballot[:1] == _NEW:
            plans.append(LocalPlan.from_bytes(memoryview(ballot)[1:], known))
            continue
        body = memoryview(ballot)[1 + DIGEST_BYTES :]
        plans.append(LocalPlan.from_bytes(body, named[ballot[1 : 1 + DIGEST_BYTES]]))
    return plans
