"""Compare the losses of two trainings, step by step. Pure; loads no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dcp_resume.errors import ConfigurationError
from dcp_resume.proof.loss_logs import LOG_SUFFIXES, LossLog, find_logs, read_log

__all__ = [
    "TOLERANCES",
    "LogComparison",
    "LogPairs",
    "StepComparison",
    "Tolerance",
    "compare_logs",
    "compare_losses",
]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Two losses are equal if their difference is within either bound.

    Both bounds 0 means equal to the last bit.
    """

    absolute: float
    relative: float = 0.0
    """Of the larger of the two."""

    def __post_init__(self) -> None:
        for bound in (self.absolute, self.relative):
            if not (math.isfinite(bound) and bound >= 0):
                raise ConfigurationError(
                    f"a tolerance must be a finite number and not negative, got {bound}",
                    option="tolerance",
                )

    def allows(self, a: float, b: float) -> bool:
        """Whether two losses are equal; never if one of them is NaN or infinite."""
        if not (math.isfinite(a) and math.isfinite(b)):
            return False
        if not self.absolute and not self.relative:
            return a.hex() == b.hex()
        return abs(a - b) <= max(self.absolute, self.relative * max(abs(a), abs(b)))


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "float64": Tolerance(1e-10, 1e-11),
        "float32": Tolerance(1e-5, 1e-6),
        "float16": Tolerance(1e-3, 1e-3),
        "bfloat16": Tolerance(1e-2, 1e-3),
    }
)
"""Of the dtype that the training computes in."""

_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class StepComparison:
    """One step that both logs have."""

    step: int
    a: float
    b: float
    is_equal: bool

    @property
    def absolute(self) -> float:
        """The difference; NaN where one of the losses is, or both are the same infinity."""
        return abs(self.a - self.b)

    @property
    def relative(self) -> float:
        """The difference, as part of the larger loss; 0 of two zeros."""
        size = max(abs(self.a), abs(self.b))
        return self.absolute / size if size else self.absolute


@dataclass(frozen=True, slots=True)
class LogComparison:
    """Two logs, aligned on the steps that both have."""

    a: LossLog
    b: LossLog
    dtype: str
    tolerance: Tolerance
    steps: tuple[StepComparison, ...]

    @property
    def is_equal(self) -> bool:
        """Whether there is a common step, and every one of them is equal."""
        return bool(self.steps) and all(step.is_equal for step in self.steps)

    @property
    def different(self) -> tuple[StepComparison, ...]:
        """The common steps that are not equal."""
        return tuple(step for step in self.steps if not step.is_equal)

    @property
    def only_in_a(self) -> tuple[int, ...]:
        """Steps that B lacks: usually those before a resume."""
        return tuple(step for step in self.a.losses if step not in self.b.losses)

    @property
    def only_in_b(self) -> tuple[int, ...]:
        """Steps that A lacks."""
        return tuple(step for step in self.b.losses if step not in self.a.losses)


def compare_losses(a: LossLog, b: LossLog, dtype: str, tolerance: Tolerance) -> LogComparison:
    """Align two logs on their common steps.

    Args:
        a: The one.
        b: The other.
        dtype: What the tolerance is for; only kept.
        tolerance: What counts as equal.
    """
    steps = tuple(
        StepComparison(step, loss, b.losses[step], tolerance.allows(loss, b.losses[step]))
        for step, loss in a.losses.items()
        if step in b.losses
    )
    return LogComparison(a, b, dtype, tolerance, steps)


@dataclass(frozen=True, slots=True)
class LogPairs:
    """The comparisons of two files, or of two directories."""

    pairs: tuple[LogComparison, ...]
    unpaired: tuple[str, ...] = ()
    """Files that one directory alone has; they are named, and decide nothing."""

    @property
    def is_equal(self) -> bool:
        """Whether something was compared, and all of it is equal."""
        return bool(self.pairs) and all(pair.is_equal for pair in self.pairs)


def compare_logs(
    a: Path, b: Path, dtype: str | None = None, tolerance: Tolerance | None = None
) -> LogPairs:
    """Compare two logs, or those of the same name in two directories.

    Files of a directory in which neither side tells a loss are passed over.

    Args:
        a: A file or a directory.
        b: The same kind.
        dtype: What the training computed in; None to take it from each file's name, else float32.
        tolerance: None for that of the dtype.

    Raises:
        ConfigurationError: One is a file, the other a directory; one cannot be read; or the dtype
            has no tolerance.
    """
    if dtype is not None and dtype not in TOLERANCES:
        raise ConfigurationError(
            f"expected a dtype of {', '.join(TOLERANCES)}, got {dtype!r}", option="dtype"
        )
    if a.is_dir() != b.is_dir():
        raise ConfigurationError(f"{a} and {b} must be two files or two directories", option="log")
    if not a.is_dir():
        return LogPairs((_compare_files(a, b, dtype, tolerance),))
    in_a, in_b = find_logs(a), find_logs(b)
    pairs = [_compare_files(in_a[n], in_b[n], dtype, tolerance) for n in in_a if n in in_b]
    if not pairs:
        raise ConfigurationError(
            f"{a} and {b} have no log of the same name; logs are files named "
            f"*{', *'.join(LOG_SUFFIXES)}, found {sorted(in_a)} and {sorted(in_b)}",
            option="log",
        )
    return LogPairs(
        tuple(pair for pair in pairs if pair.a.losses or pair.b.losses),
        tuple(sorted(in_a.keys() ^ in_b.keys())),
    )


def _compare_files(
    a: Path, b: Path, dtype: str | None, tolerance: Tolerance | None
) -> LogComparison:
    dtype = dtype or _dtype_in(a.name) or _DTYPE
    return compare_losses(read_log(a), read_log(b), dtype, tolerance or TOLERANCES[dtype])


def _dtype_in(name: str) -> str | None:
    """The dtype that a file's name tells, such as ``ckpt_bfloat16.log``."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((dtype for dtype in TOLERANCES if dtype in words), None)
