"""How an upload is cut into parts, and how many leave at a time: by size, memory and rate."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUDGET_BYTES", "WHOLE_BYTES", "PartPlan", "PartRate", "plan_parts"]

MIB = 1 << 20
MIN_PART_BYTES = 5 * MIB
"""S3's limit; the last part may be smaller."""
MAX_PART_BYTES = 5 << 30
"""S3's limit."""
MAX_PARTS = 10_000
"""S3's limit."""
WHOLE_BYTES = 16 * MIB
"""An object up to this is sent whole, in one request instead of four."""
SMALL_PART_BYTES = 8 * MIB
"""None but the last is smaller: each request costs 2 ms of CPU, be its bytes slow or not."""
LARGE_PART_BYTES = 32 * MIB
"""No part is larger without need: above it glibc allocates each afresh, which doubles its cost."""
PART_MS = 250
"""A part is to last so long: what a request costs beside its bytes, some 30 ms, is little then, and
a part that has to be sent again soon is."""
FIRST_RATE = 64 * MIB
"""Bytes per second of one request to S3, until it is measured: parts of 16 MiB."""
BUDGET_BYTES = 128 * MIB
"""In flight at once to one store, over all of its uploads in this process."""


@dataclass(frozen=True, slots=True)
class PartPlan:
    """How one object is uploaded."""

    part_bytes: int
    """Of each part but the last, of which there are two at least."""
    width: int
    """Parts in flight at a time, at most."""


def plan_parts(size: int, *, rate: int, budget_bytes: int = BUDGET_BYTES) -> PartPlan:
    """Cut an object so that each part lasts a quarter of a second, and fill the budget with parts.

    Slow requests become small and many, fast ones large and few.

    Args:
        size: Of the object, in bytes; more than ``WHOLE_BYTES``.
        rate: Bytes per second that one request has been measured to carry.
        budget_bytes: That may be in flight; a part exceeds it only where there would otherwise be
            more than 10,000, and then leaves alone.

    Raises:
        ValueError: S3 takes no object so large.
    """
    wanted = min(max(rate * PART_MS // 1000, SMALL_PART_BYTES), LARGE_PART_BYTES, budget_bytes)
    halves = _ceil(_ceil(size, 2), MIB) * MIB
    whole = max(min(wanted // MIB * MIB, halves), MIN_PART_BYTES)
    part_bytes = max(whole, _ceil(_ceil(size, MAX_PARTS), MIB) * MIB)
    if part_bytes > MAX_PART_BYTES:
        raise ValueError(
            f"S3 takes at most {MAX_PARTS} parts of {MAX_PART_BYTES} bytes, not {size} bytes"
        )
    return PartPlan(part_bytes, max(1, budget_bytes // part_bytes))


def _ceil(amount: int, divisor: int) -> int:
    return -(-amount // divisor)


class PartRate:
    """The rate of one request: a mean in which the last ones weigh most."""

    def __init__(self) -> None:
        self.bytes_per_s = FIRST_RATE

    def note(self, num_bytes: int, duration_ns: int) -> None:
        """Count a part that has arrived; small ones say more of the request than of the rate."""
        if num_bytes >= MIN_PART_BYTES:
            found = num_bytes * 10**9 // max(duration_ns, 1)
            self.bytes_per_s = (3 * self.bytes_per_s + found) // 4
