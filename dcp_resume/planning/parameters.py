"""Which parameter a leaf belongs to, by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["EXECUTION", "Owner", "ParameterNames", "is_model_part"]

EXECUTION = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Group options that say how a step is computed on this machine, not what it computes."""


def is_model_part(fqn: str) -> bool:
    """Whether a leaf lies in a part of parameters: ``model``, ``model_ema`` and the like."""
    return "." in fqn and fqn.startswith("model")


@dataclass(frozen=True, slots=True)
class Owner:
    """A parameter, and what a leaf's name has around that of the parameter."""

    fqn: str
    before: str
    """``optim.state.``"""
    after: str
    """``.exp_avg``"""


class ParameterNames:
    """Parameters of a state by their FQNs.

    A leaf outside of model parts belongs to the parameter whose name, without the part, its own
    name contains; to the longest, if there are several:

        >>> names = ParameterNames(["model.wq.weight", "model.layers.0.wq.weight"])
        >>> names.owner("optim.state.layers.0.wq.weight.exp_avg")
        Owner(fqn='model.layers.0.wq.weight', before='optim.state.', after='.exp_avg')

    Args:
        fqns: Of all leaves; those outside of model parts are passed over.
    """

    def __init__(self, fqns: Iterable[str]) -> None:
        self._by_name: Mapping[str, str] = {
            fqn.partition(".")[2]: fqn for fqn in fqns if is_model_part(fqn)
        }

    def owner(self, fqn: str) -> Owner | None:
        """The parameter that a leaf belongs to; None for parameters themselves, and for others."""
        return None if is_model_part(fqn) else self._inner(fqn.split("."))

    def _inner(self, words: Sequence[str]) -> Owner | None:
        for length in range(len(words) - 1, 0, -1):
            for start in range(1, len(words) - length + 1):
                stop = start + length
                fqn = self._by_name.get(".".join(words[start:stop]))
                if fqn is not None:
                    after = "".join(f".{word}" for word in words[stop:])
                    return Owner(fqn, ".".join(words[:start]) + ".", after)
        return None
