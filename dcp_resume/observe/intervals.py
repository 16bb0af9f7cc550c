"""How often to save: where the cost of saves and the work that a failure loses are least together.

``cost_s`` is what one save takes from the trainer: of a save in the background only the seconds
that the trainer stands still. ``mtbf_s`` is the mean time between two failures of the whole job.
"""

from __future__ import annotations

import math

from dcp_resume.errors import ConfigurationError

__all__ = ["advised_interval_s", "daly_interval_s", "young_interval_s"]


def young_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves, to the first order.

    J. W. Young, "A first order approximation to the optimum checkpoint interval",
    Communications of the ACM 17(9), 1974: the square root of 2 · cost · MTBF.

    Raises:
        ConfigurationError: ``cost_s`` is negative, or ``mtbf_s`` is not above 0.

    >>> young_interval_s(2, 10_000)
    200.0
    """
    _check(cost_s, mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves, also where the cost is no small part of the MTBF.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
    Future Generation Computer Systems 22(3), 2006, equation 37.

    Raises:
        ConfigurationError: ``cost_s`` is negative, or ``mtbf_s`` is not above 0.

    >>> round(daly_interval_s(2, 10_000), 1)
    198.7
    """
    _check(cost_s, mtbf_s)
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    share = cost_s / (2 * mtbf_s)
    first = math.sqrt(2 * cost_s * mtbf_s)
    return first * (1 + math.sqrt(share) / 3 + share / 9) - cost_s


def advised_interval_s(cost_s: float, mtbf_s: float, commit_s: float = 0.0) -> float:
    """Daly's interval, and no less than a save takes: until it committed the next would wait.

    Args:
        cost_s: What one save takes from the trainer.
        mtbf_s: Mean time between failures.
        commit_s: From the call of ``save`` to the commit.

    Raises:
        ConfigurationError: ``cost_s`` is negative, or ``mtbf_s`` is not above 0.
    """
    return max(daly_interval_s(cost_s, mtbf_s), commit_s)


def _check(cost_s: float, mtbf_s: float) -> None:
    if not 0 <= cost_s < math.inf:
        raise ConfigurationError(
            f"cost_s must be finite and 0 or more seconds, got {cost_s!r}", option="cost_s"
        )
    if not 0 < mtbf_s < math.inf:
        raise ConfigurationError(
            f"mtbf_s must be finite and more than 0 seconds, got {mtbf_s!r}", option="mtbf_s"
        )
