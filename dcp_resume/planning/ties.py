"""Weights that are one in training but have two names, maybe on two pipeline stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from dcp_resume.errors import ConfigurationError
from dcp_resume.planning.parameters import Owner, ParameterNames

__all__ = ["Ties", "check_ties"]


def check_ties(ties: Mapping[str, str]) -> None:
    """Refuse ties that have no first name.

    Raises:
        ConfigurationError: They lead in a circle.
    """
    for fqn in ties:
        _first(fqn, ties)


def _first(fqn: str, ties: Mapping[str, str]) -> str:
    met = [fqn]
    while met[-1] in ties:
        if ties[met[-1]] in met:
            raise ConfigurationError(
                f"the ties {' → '.join((*met, ties[met[-1]]))} lead in a circle; tie each name to "
                f"the one under which the tensor shall be stored",
                option="ties",
            )
        met.append(ties[met[-1]])
    return met[-1]


class Ties:
    """Names of one tensor, of parameters and of what belongs to them.

        >>> ties = Ties({"model.head.weight": "model.embed.weight"})
        >>> ties.canonical("optim.state.head.weight.exp_avg")
        'optim.state.embed.weight.exp_avg'

    Args:
        names: Further name → the name it is tied to; FQNs of parameters.
        known: FQNs of the state, so that no part of a longer parameter's name is taken for one.
    """

    def __init__(
        self, names: Mapping[str, str] = MappingProxyType({}), known: Collection[str] = ()
    ) -> None:
        self._first = {fqn: _first(fqn, names) for fqn in names}
        tied = {*self._first, *self._first.values()}
        self._tied = tied
        self._parameters = ParameterNames((*known, *tied) if tied else ())

    def canonical(self, fqn: str) -> str:
        """The name under which a leaf is stored; its own if it is not tied."""
        return self.names(fqn)[0]

    def names(self, fqn: str) -> tuple[str, ...]:
        """Every name of a leaf, the canonical one first; its own alone if it is not tied."""
        owner = self._owner(fqn)
        if owner is None:
            return (fqn,)
        first = self._first.get(owner.fqn, owner.fqn)
        further = (name for name, target in self._first.items() if target == first)
        return tuple(owner.before + _suffix(n, owner) + owner.after for n in (first, *further))

    def is_tied(self, fqn: str) -> bool:
        """Whether a leaf has several names."""
        return self._owner(fqn) is not None

    def _owner(self, fqn: str) -> Owner | None:
        if fqn in self._tied:
            return Owner(fqn, "", "")
        owner = self._parameters.owner(fqn) if self._tied else None
        return owner if owner is not None and owner.fqn in self._tied else None


def _suffix(fqn: str, owner: Owner) -> str:
    """A parameter's name as it stands in the leaf: with its part only in its own name."""
    return fqn if not owner.before else fqn.partition(".")[2]
