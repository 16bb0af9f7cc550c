"""A stable order of rows by an integer, for millions of rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["stable_order"]

I64 = npt.NDArray[np.int64]


def stable_order(keys: I64) -> tuple[I64, I64]:
    """Rows in ascending order of their keys, equal ones as they stand, and the sorted keys.

    Args:
        keys: int64[n], not negative.
    """
    bits = len(keys).bit_length()
    if int(keys.max(initial=0)).bit_length() + bits > 63:
        order = np.argsort(keys, kind="stable")
        return order, keys[order]
    # Sorting values is several times faster than sorting their positions.
    both = keys << bits
    both |= np.arange(len(keys))
    both.sort()
    order = both & ((1 << bits) - 1)
    both >>= bits
    return order, both
