"""Which windows of a checkpoint are read where not all of them are."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from dcp_resume.errors import ConfigurationError

__all__ = ["WHOLE", "PartOf", "RandomShare", "Sample"]


class Sample(Protocol):
    """A choice among windows."""

    def choose(self, num_windows: int) -> Collection[int]:
        """Numbers, from 0, of the windows to read."""


@dataclass(frozen=True, slots=True)
class PartOf:
    """One of several parts that together are the whole: such as one a night.

    Raises:
        ConfigurationError: There is no such part.
    """

    number: int
    """From 1."""
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ConfigurationError(
                f"expected a part from 1/{self.count} to {self.count}/{self.count}, got {self}",
                option="sample",
            )

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def choose(self, num_windows: int) -> Collection[int]:
        """Every ``count``-th."""
        return range(self.number - 1, num_windows, self.count)


WHOLE = PartOf(1, 1)
"""Every window."""


@dataclass(frozen=True, slots=True)
class RandomShare:
    """A share drawn at random; equal seeds draw equal windows.

    Raises:
        ConfigurationError: The share is not above 0 and at most 1.
    """

    share: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigurationError(
                f"expected a share above 0% and up to 100%, got {100 * self.share:g}%",
                option="sample",
            )

    def __str__(self) -> str:
        return f"{100 * self.share:g}% (seed {self.seed})"

    def choose(self, num_windows: int) -> Collection[int]:
        """So many that the share is reached."""
        count = math.ceil(self.share * num_windows)
        return frozenset(random.Random(self.seed).sample(range(num_windows), count))
