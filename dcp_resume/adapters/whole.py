"""State of another trainer, kept whole: nested as it likes, it is one leaf of plain values.

A trainer's own bookkeeping (loops, schedulers, callbacks) has other keys from one step to the next,
so that its names cannot be compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from dcp_resume.format.leaves import decode_leaf, encode_leaf
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.session.ranks import place_in_world

__all__ = ["WholeOfRank", "WholeValue"]


class WholeValue:
    """A ``Stateful`` of one value; all ranks have it, and the coordinator's is saved.

    Args:
        name: Of the part, for messages.
        get: Returns the value: plain ones, arrays and small tensors, nested.
        put: Takes what was saved.
    """

    of_coordinator: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self._name, self._get, self._put = name, get, put

    def state_dict(self) -> dict[str, Any]:
        """The value, encoded, so that no tensor inside becomes a leaf of its own.

        Raises:
            UnsupportedLeaf: It holds something that has no form without pickle.
        """
        return {"value": [encode_leaf(self._get(), self._name)]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Hand the saved value over.

        Raises:
            InvalidDocument: It cannot be decoded.
        """
        [encoded] = state_dict["value"]
        self._put(decode_leaf(encoded, self._name))


class WholeOfRank(WholeValue):
    """The same of a value of each rank's own.

    Args:
        name: Of the part, for messages.
        get: Returns this rank's value.
        put: Takes what this rank saved.
        derive: Called with the step instead of ``put`` where the number of ranks changed.
        is_bound: Whether the value, as it is now, is of use to as many ranks only.
    """

    of_coordinator: ClassVar[tuple[str, ...]] = ()
    per_rank: ClassVar[tuple[str, ...]] = ("value",)

    def __init__(
        self,
        name: str,
        get: Callable[[], Any],
        put: Callable[[Any], object],
        *,
        derive: Callable[[int], object],
        is_bound: Callable[[], bool],
    ) -> None:
        super().__init__(name, get, put)
        self._derive, self._is_bound = derive, is_bound

    def state_dict(self) -> dict[str, Any]:
        """The value of this rank, and of how many ranks it is one.

        Raises:
            UnsupportedLeaf: It holds something that has no form without pickle.
        """
        count = place_in_world()[1]
        return {"num_ranks": count, "is_bound": self._is_bound(), **super().state_dict()}

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """Whether each rank can go on with its own value."""
        was, now = saved.get("num_ranks"), place_in_world()[1]
        if was == now:
            return
        if saved.get("is_bound"):
            message = (
                f"saved by {was} rank(s) in the middle of an epoch, now {now}: batches are counted "
                f"by each rank; resume on {was}, or from a checkpoint between two epochs"
            )
            yield ReportItem(Severity.REFUSE, "position", "num_ranks", message)
        else:
            message = f"saved by {was} rank(s), now {now}: random numbers are derived anew"
            yield ReportItem(Severity.WARN, "rng", "", message)

    def derive(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on without the value of this rank."""
        del saved
        self._derive(step)
