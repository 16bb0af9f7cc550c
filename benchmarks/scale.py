"""Planning: what the coordinator spends, by number of simulated ranks."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.names import A_PAIR, INDEX, PLANNING_CPU, planned
from benchmarks.options import Options
from benchmarks.planning import Planned, plan_saves
from benchmarks.samples import Figure, Findings

__all__ = ["measure_planning"]

_RANKS, _TENSORS = (8, 64, 512, 2048, 8192), 300
_FEW_RANKS, _FEW_TENSORS = (8, 64), 20


def measure_planning(options: Options) -> Iterator[Findings]:
    """First saves, and saves of the same structure again."""
    label = options.label("planning")
    ranks, tensors = (_FEW_RANKS, _FEW_TENSORS) if options.is_tiny else (_RANKS, _TENSORS)
    figures = [
        figure
        for number in ranks
        for save in plan_saves(number, tensors)
        for figure in _figures(save, label)
    ]
    yield Findings("planning", label, ranks[-1], 0, others=figures)


def _figures(save: Planned, label: str) -> Iterator[Figure]:
    operation = planned(save.ranks, save.tensors, save.save)
    for measure, value in (
        (A_PAIR, save.microseconds_a_pair),
        (PLANNING_CPU, sum(save.seconds.values())),
        (INDEX, (save.index_bytes - save.digest_bytes) / 1e6),
    ):
        yield Figure(label, operation, "dcp_resume", measure, value)
