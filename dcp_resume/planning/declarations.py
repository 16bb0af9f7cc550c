"""What a caller knows of its leaves and torch does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from dcp_resume.planning.declared import Flat, Layout, Split
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.ties import check_ties

__all__ = ["Declarations", "Parameter"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as this rank holds it."""

    fqn: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Declarations:
    """What the caller knows of leaves and torch does not say. Patterns as in ``fnmatch``.

    Raises:
        ConfigurationError: Ties that lead in a circle.
    """

    per_rank: tuple[str, ...] = ()
    """FQNs whose value differs between ranks on purpose, and is kept for each."""
    from_rank: Mapping[str, int] = field(default_factory=dict)
    """FQN pattern → the rank whose value stands for all."""
    mesh: MeshPlace = field(default_factory=MeshPlace)
    """Where this rank is, for ``layouts``."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """FQN pattern → how plain tensors of such names, and the moments of these, are cut."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """FQN of a parameter → FQN of the one that it is tied to, where pipeline stages hold both."""

    def __post_init__(self) -> None:
        check_ties(self.ties)

    def layout_of(
        self, fqn: str, shape: tuple[int, ...], parameter: Parameter | None = None
    ) -> Layout | None:
        """The layout of a plain tensor, if one was declared.

        The first pattern counts that matches the tensor's name, or, if it has the shape of the
        parameter that it belongs to, the parameter's name. A pattern that matches the parameter is
        passed over for tensors of other shapes, such as step counts and factored moments, and so
        is a layout with more dims than the tensor.

        Args:
            fqn: Of the tensor.
            shape: Its local shape.
            parameter: That it belongs to.
        """
        is_alike = parameter is not None and parameter.shape == shape
        for pattern, layout in self.layouts.items():
            is_of_parameter = parameter is not None and fnmatchcase(parameter.fqn, pattern)
            is_named = is_alike if is_of_parameter else fnmatchcase(fqn, pattern)
            if is_named and (isinstance(layout, Flat) or layout.fits(len(shape))):
                return layout
        return None

    def is_per_rank(self, fqn: str) -> bool:
        """Whether ``fqn`` was declared per-rank."""
        return any(fnmatchcase(fqn, pattern) for pattern in self.per_rank)

    def source_rank(self, fqn: str) -> int | None:
        """The rank whose value of ``fqn`` stands for all, if one was declared."""
        return next((r for p, r in self.from_rank.items() if fnmatchcase(fqn, p)), None)

    def to_text(self) -> str:
        """All that is declared, in its order; the order of patterns and axes counts."""
        layouts = [
            (pattern, layout, list(layout.dims.items()) if isinstance(layout, Split) else [])
            for pattern, layout in self.layouts.items()
        ]
        from_rank, ties = list(self.from_rank.items()), list(self.ties.items())
        return repr((tuple(self.per_rank), from_rank, self.mesh, layouts, ties))
