"""What a run's saves cost, for logs, metrics, traces and terminals: subscribers to the events."""

from __future__ import annotations

from dcp_resume.observe.goodput import Goodput
from dcp_resume.observe.intervals import advised_interval_s, daly_interval_s, young_interval_s
from dcp_resume.observe.json_lines import JsonLines
from dcp_resume.observe.progress import SaveProgress

__all__ = [
    "Goodput",
    "JsonLines",
    "SaveProgress",
    "advised_interval_s",
    "daly_interval_s",
    "young_interval_s",
]
