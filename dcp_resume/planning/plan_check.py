"""What the ranks' plans say of themselves is checked before anything follows from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dcp_resume.errors import InvalidDocument, Problem
from dcp_resume.planning.plans import PlanShape

__all__ = ["check_listed", "check_places", "repeated"]

_I32 = npt.NDArray[np.int32]


def check_places(shapes: Sequence[PlanShape]) -> None:
    """Refuse a plan that is said to be another rank's: its files would be written by that one.

    Raises:
        InvalidDocument: A rank says that it is another.
    """
    for rank, shape in enumerate(shapes):
        if shape.rank != rank:
            raise _malformed(f"rank {rank} says that it is rank {shape.rank}")


def check_listed(named: _I32, listed: Sequence[int], counts: Sequence[int], what: str) -> None:
    """Refuse positions beyond what each rank lists: numpy would take a negative one.

    Args:
        named: The ranks' positions, end to end.
        listed: How many each rank lists.
        counts: How many positions each rank has.
        what: Of what.

    Raises:
        InvalidDocument: A position names nothing.
    """
    is_wrong = (named < 0) | (named >= repeated(listed, counts))
    if is_wrong.any():
        rank = int(repeated(range(len(counts)), counts)[is_wrong][0])
        raise _malformed(f"rank {rank} names {what} that it does not list")


def repeated(of_ranks: Sequence[int], counts: Sequence[int]) -> _I32:
    """Each rank's number as often as it has positions."""
    return np.repeat(np.asarray(of_ranks, np.int32), counts)


def _malformed(message: str) -> InvalidDocument:
    return InvalidDocument(
        f"{message}; use one version of dcp_resume", problems=(Problem("plan", "plan", message),)
    )
