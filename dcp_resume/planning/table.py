"""Chunks as columns: one row a chunk, so that ten thousand ranks are handled without objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Table"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Table:
    """Chunks as columns; ``n`` rows, boxes padded to ``D`` dims by offset 0 and size 1."""

    tensor: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    offsets: I64
    sizes: I64

    def take(self, rows: Any) -> Table:
        """The rows selected by an index or mask."""
        return Table(self.tensor[rows], self.rank[rows], self.offsets[rows], self.sizes[rows])

    def where(self, is_kept: npt.NDArray[np.bool_]) -> Table:
        """The rows of a mask; the table itself where these are all."""
        return self if is_kept.all() else self.take(is_kept)

    @staticmethod
    def concatenate(tables: Sequence[Table]) -> Table:
        """Tables one behind the other."""
        if len(tables) == 1:
            return tables[0]
        return Table(
            np.concatenate([t.tensor for t in tables]),
            np.concatenate([t.rank for t in tables]),
            np.concatenate([t.offsets for t in tables]),
            np.concatenate([t.sizes for t in tables]),
        )
