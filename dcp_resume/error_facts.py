"""The root of the tree of errors: an error says its facts as attributes, and travels with them."""

from __future__ import annotations

from inspect import get_annotations
from typing import Any

__all__ = ["DcpResumeError"]


def _rebuild(kind: type[DcpResumeError], message: str, facts: dict[str, Any]) -> DcpResumeError:
    return kind(message, **facts)


class DcpResumeError(Exception):
    """Base of every error of this library.

    Args:
        message: What failed, on which object, expected and found, and what to do.
        facts: A value for each attribute that the class annotates; none more, none less.

    Raises:
        TypeError: A fact is missing or unknown (a bug at the raise site).
    """

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        expected = self.fact_names()
        if set(facts) != set(expected):
            raise TypeError(f"{type(self).__name__} takes facts {expected}, got {sorted(facts)}")
        self.message = message
        self._facts = facts
        for name, value in facts.items():
            setattr(self, name, value)

    @classmethod
    def fact_names(cls) -> tuple[str, ...]:
        """Names of the attributes that an instance carries, in order of declaration."""
        names: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, DcpResumeError):
                names.update(dict.fromkeys(get_annotations(base)))
        return tuple(names)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self._facts))

    def __str__(self) -> str:
        return self.message
