"""Prove a load: the ranks' memory together holds the tensors that were saved."""

from __future__ import annotations

from collections.abc import Iterator

from dcp_resume.errors import TensorMismatch
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.padding import logical_shape
from dcp_resume.planning.state import LocalState
from dcp_resume.problems import summarise
from dcp_resume.session.held_tensors import HeldMemory, HeldTotals, digest_held
from dcp_resume.session.opening import OpenedCheckpoint
from dcp_resume.session.tensor_digests import can_have_digest, differing, recorded_digest
from dcp_resume.session.votes import Votes

__all__ = ["prove_loaded", "unrecorded"]


def unrecorded(opened: OpenedCheckpoint, state: LocalState) -> Iterator[ReportItem]:
    """What a load into ``state`` could not prove, because nothing was recorded."""
    message = (
        "the checkpoint records no digest to prove it by; save with "
        "tensor_digests=TensorDigests.RECORD, or load with prove=Prove.BLOCKS"
    )
    for fqn in dict.fromkeys(fqn for _, fqn in _loaded(opened, state)):
        entry = opened.entry(fqn)
        if can_have_digest(entry) and recorded_digest(entry) is None:
            yield ReportItem(Severity.REFUSE, "tensor_digest", fqn, message)


def prove_loaded(votes: Votes, opened: OpenedCheckpoint, state: LocalState) -> None:
    """Digest what was loaded, in the ranks' own memory, and compare with what was recorded.

    Args:
        votes: Of the load.
        opened: What was loaded.
        state: Into what.

    Raises:
        TensorMismatch: On every rank alike; every tensor that is not as it was saved.
        RankErrors: A rank could not read its memory.
        RankSilent: A rank did not answer by the deadline.
    """
    held: list[HeldMemory] = []
    for tensor, fqn in _loaded(opened, state):
        entry = opened.entry(fqn)
        if recorded_digest(entry) is not None:
            itemsize, shape = ITEMSIZES[entry.dtype], logical_shape(entry)
            held.append(HeldMemory(fqn, (fqn,), shape, itemsize, tensor.pieces))

    def decide(totals: HeldTotals) -> bytes:
        pairs = ((opened.entry(fqn), found) for fqn, found in totals.digests.items())
        problems = tuple(sorted([*totals.problems, *differing(pairs)]))
        if not problems:
            return b""
        names = [problem.where for problem in problems]
        recorded = {fqn: recorded_digest(opened.entry(fqn)) for fqn in names}
        step = opened.manifest.step
        raise TensorMismatch(
            f"step {step} was loaded, but {len(problems)} tensor(s) in memory are not as they were "
            f"saved:\n{summarise(problems)}\ndo not go on with this state. If `dcp-resume verify "
            f"--tensors --step {step}` names them too, load another step; if not, suspect a host's "
            f"memory, or this library, and load again",
            step=step,
            problems=problems,
            expected={fqn: digest.hex for fqn, digest in recorded.items() if digest is not None},
            found={fqn: totals.digests[fqn].hex for fqn in names if fqn in totals.digests},
        )

    digest_held(votes, held, decide)


def _loaded(opened: OpenedCheckpoint, state: LocalState) -> Iterator[tuple[HeldTensor, str]]:
    """What a load sets, and the name of the stored tensor that it is set from."""
    for held in state.distinct_tensors():
        name = state.stored_name(held.entry.fqn, opened.tensor_ids)
        if name is not None and held.entry.kind != "per_rank":
            yield held, opened.entry(name).fqn
