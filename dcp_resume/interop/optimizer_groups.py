"""An optimizer's state as torch's state dicts nest it, under the names that a run gives it.

torch keeps options by group, and a run by parameter, as torch does where it is asked to flatten:
``optim.param_groups.0.lr`` is ``optim.param_groups.<parameter>.lr`` here. Numbered parameters stay
as they are: nothing says which they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dcp_resume.planning.flattening import Path, fqn_of
from dcp_resume.planning.parameters import EXECUTION

__all__ = ["OptimizerGroups"]


class OptimizerGroups:
    """The groups among the values of a foreign checkpoint whose parameters have names.

    Args:
        values: Name → key path and value.
    """

    def __init__(self, values: Mapping[str, tuple[Path, Any]]) -> None:
        self._values = values
        self._groups = {path[:-1]: v for path, v in values.values() if _are_names(path, v)}
        self._optimizers = {path[:-2] for path in self._groups}

    def values(self) -> Iterator[tuple[Path, Any]]:
        """Key paths and values, with options by parameter."""
        for path, value in self._values.values():
            if path[:-1] not in self._groups:
                yield self.path(path), value
            elif path[-1] not in EXECUTION:
                for parameter in self._groups[path[:-1]]:
                    yield (*path[:-3], f"param_groups.{parameter}.{path[-1]}"), value

    def path(self, path: Path) -> Path:
        """The key path of a moment, in one piece below its optimizer; other paths as they are."""
        if path[-3:-2] == ("state",) and path[:-3] in self._optimizers:
            return (*path[:-3], fqn_of(path[-3:]))
        return path


def _are_names(path: Path, value: Any) -> bool:
    return (
        path[-3:-2] == ("param_groups",)
        and path[-1] == "params"
        and isinstance(value, list)
        and all(isinstance(name, str) for name in value)
    )
