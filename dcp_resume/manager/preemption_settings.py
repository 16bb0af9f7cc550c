"""Every option of a ``Preemption``, with its unit, default and check."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.grace import WhenShort
from dcp_resume.manager.notices import NoticeSource

__all__ = ["EXIT_PREEMPTED", "PreemptionSettings"]

EXIT_PREEMPTED = 75
"""Exit code of a process that stopped because of a notice: start it again. The ``EX_TEMPFAIL`` of
BSD's ``sysexits.h``."""

_END_TIME_VARIABLE = "SLURM_JOB_END_TIME"


def _three_signals() -> dict[str, float]:
    return {"SIGTERM": 30.0, "SIGUSR1": 30.0, "SIGINT": 30.0}


def _end_of_allocation() -> float:
    return float(os.environ.get(_END_TIME_VARIABLE, "inf"))


@dataclass(frozen=True, slots=True)
class PreemptionSettings:
    """Options of a ``Preemption``, checked together at construction.

    Raises:
        ConfigurationError: An option that cannot work.
    """

    signals: Mapping[str, float] = field(default_factory=_three_signals)
    """Name of each signal that is a notice → seconds from it until the process is killed."""
    sources: Sequence[NoticeSource] = ()
    """Functions that return a ``Notice``, or None as long as there is none."""
    sources_interval_s: float = 5.0
    """Seconds between two calls of each source."""
    exit_after_s: float = math.inf
    """Seconds after which to stop by ourselves."""
    end_time: float = field(default_factory=_end_of_allocation)
    """Unix time, seconds, at which the platform stops us; by default what Slurm says."""
    lead_s: float = 120.0
    """Seconds before ``end_time`` at which the notice comes."""
    when_short: WhenShort = WhenShort.LEAVE
    margin: float = 1.5
    """How many times its measured duration a save is given."""
    poll_s: float = 0.5
    """Seconds between two looks of a rank for the notice of another."""
    exit_code: int = EXIT_PREEMPTED

    def __post_init__(self) -> None:
        known = {number.name for number in signal.Signals} - {"SIGKILL", "SIGSTOP"}
        unknown = sorted(set(self.signals) - known)
        if unknown:
            raise _wrong("signals", unknown, "names of signals that can be caught")
        for name in ("sources_interval_s", "poll_s", "lead_s", "exit_after_s"):
            if not getattr(self, name) > 0:
                raise _wrong(name, getattr(self, name), "more than 0 seconds")
        if not self.margin >= 1:
            raise _wrong("margin", self.margin, "1 or more")
        if not 0 < self.exit_code < 128:
            raise _wrong("exit_code", self.exit_code, "1 to 127")


def _wrong(option: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{option} must be {expected}, got {value!r}", option=option)
