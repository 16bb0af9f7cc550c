"""The encoded values of one owner's states, of which most stay as they are from save to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dcp_resume.errors import Problem, UnsupportedLeaf
from dcp_resume.format.leaves import encode_leaf
from dcp_resume.manifest.values import Json
from dcp_resume.planning.flattening import Path
from dcp_resume.problems import summarise

__all__ = ["EncodedValues", "NamedValue", "ValueMemory", "refuse_leaves"]

EncodedValues = Mapping[str, tuple[Path, Json]]
"""FQN → key path and encoded value."""
_FIXED = frozenset({type(None), bool, int, float, str})
_UNKNOWN = object()


class NamedValue(NamedTuple):
    """A leaf that is no tensor."""

    position: int
    """Among the leaves of its state."""
    path: Path
    fqn: str


class ValueMemory:
    """Encodes values of the same names again and again; it keeps only what cannot change.

    Args:
        names: Of the values.
    """

    def __init__(self, names: Sequence[NamedValue]) -> None:
        self._names = names
        self._values: list[object] = [_UNKNOWN] * len(names)
        self._encoded: dict[str, tuple[Path, Json]] = {}

    def encode(self, values: Sequence[object]) -> EncodedValues:
        """Encode values that come in the order of the names; an object met before is not again.

        Raises:
            UnsupportedLeaf: Of types that are never stored, all of them listed.
        """
        encoded: dict[str, tuple[Path, Json]] = {}
        problems: list[Problem] = []
        for (_, path, fqn), value, before in zip(self._names, values, self._values, strict=True):
            if value is before:
                encoded[fqn] = self._encoded[fqn]
                continue
            try:
                encoded[fqn] = (path, encode_leaf(value, fqn))
            except UnsupportedLeaf as error:
                problems.extend(error.problems)
        refuse_leaves(problems)
        self._values = [value if _is_fixed(value) else _UNKNOWN for value in values]
        self._encoded = encoded
        return encoded


def refuse_leaves(problems: Sequence[Problem]) -> None:
    """Refuse leaves that cannot be stored.

    Raises:
        UnsupportedLeaf: There are some.
    """
    if problems:
        raise UnsupportedLeaf(
            f"cannot save {len(problems)} leaves:\n{summarise(problems)}", problems=tuple(problems)
        )


def _is_fixed(value: object) -> bool:
    kind = type(value)
    if kind is tuple:
        return all(type(item) in _FIXED for item in value)  # type: ignore[attr-defined]
    return kind in _FIXED
