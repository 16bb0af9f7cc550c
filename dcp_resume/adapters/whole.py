"""State of another trainer, kept whole: nested as it likes, it is one leaf of plain values.

A trainer's own bookkeeping (loops, schedulers, callbacks) has other keys from one step to the next,
so that its names cannot be compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map

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
        return {"value": [encode_leaf(tree_map(_on_host, self._get()), self._name)]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Hand the saved value over.

        Raises:
            InvalidDocument: It cannot be decoded.
        """
        [encoded] = state_dict["value"]
        self._put(decode_leaf(encoded, self._name))


class WholeOfRank(WholeValue):
    """The same of a value of each rank's own, such as its place in the data.

    Args:
        name: Of the part, for messages.
        get: Returns this rank's value.
        put: Takes what this rank saved.
        derive: Called with the step instead of ``put`` where the number of ranks changed, and the
            value is not bound.
        is_bound: Says at each save whether the value is of no use to another number of ranks, or
            where another number in ``bound_to`` changed.
        bound_to: Numbers by name, equal on all ranks.
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
        bound_to: Mapping[str, int],
    ) -> None:
        super().__init__(name, get, put)
        self._derive, self._is_bound = derive, is_bound
        self._bound_to = {"num_ranks": place_in_world()[1], **bound_to}

    def state_dict(self) -> dict[str, Any]:
        """The value of this rank, and what it depends on.

        Raises:
            UnsupportedLeaf: It holds something that has no form without pickle.
        """
        return {"is_bound": self._is_bound(), **self._bound_to, **super().state_dict()}

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """Whether each rank can go on with its own value."""
        if saved.get("is_bound"):
            for name, now in self._bound_to.items():
                if saved.get(name) != now:
                    message = (
                        f"saved with {saved.get(name)}, now {now}: batches are counted by each "
                        f"rank; resume with {saved.get(name)}"
                    )
                    yield ReportItem(Severity.REFUSE, "position", name, message)
        elif saved.get("num_ranks") != self._bound_to["num_ranks"]:
            message = (
                f"saved by {saved.get('num_ranks')} rank(s), now {self._bound_to['num_ranks']}: "
                f"random numbers are derived anew"
            )
            yield ReportItem(Severity.WARN, "rng", "", message)

    def derive(self, saved: Mapping[str, Any], step: int) -> None:
        """Go on without the value of this rank."""
        del saved
        self._derive(step)


def _on_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
