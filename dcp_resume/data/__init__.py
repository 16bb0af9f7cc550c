"""The place in the data: counted in samples, so that any number of ranks can go on from it."""

from __future__ import annotations

from dcp_resume.data.loader import ResumableLoader
from dcp_resume.data.order import Order
from dcp_resume.data.position import Tail
from dcp_resume.data.randomness import Randomness, keyed_randomness
from dcp_resume.data.sampler import ResumableSampler
from dcp_resume.data.worker_signals import ignore_notices

__all__ = [
    "Order",
    "Randomness",
    "ResumableLoader",
    "ResumableSampler",
    "Tail",
    "ignore_notices",
    "keyed_randomness",
]
