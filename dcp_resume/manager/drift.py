"""Facts of a training that its tensors do not show: collected at each save, compared at a load.

A checkpoint that fits tensor by tensor may still be another model's, continue with other data, or
under another torch. What differs is an item of the report; ``LoadOptions.overrides`` decides
otherwise where the caller knows better.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from dcp_resume.manager.optimizers import inner_optimizer
from dcp_resume.manager.stateful import optimizers_of
from dcp_resume.manifest.models import Manifest
from dcp_resume.manifest.report import ReportItem, Severity
from dcp_resume.planning.parameters import EXECUTION
from dcp_resume.session.documents import Facts, software

__all__ = ["fact_differences", "optimizer_facts", "precision_facts"]


def optimizer_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Key of each optimizer in the state → its type and the options of its groups."""
    facts: dict[str, Any] = {}
    for key, (first, *_) in optimizers_of(state).items():
        kind = type(inner_optimizer(first))
        facts[key] = {
            "type": f"{kind.__module__}.{kind.__qualname__}",
            "groups": [_options(group) for group in first.param_groups],
        }
    return facts


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in group.items():
        plain = value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value
        plain = list(plain) if isinstance(plain, tuple) else plain
        if name not in EXECUTION and isinstance(plain, (bool, int, float, str, list)):
            kept[name] = plain
    return kept


def precision_facts() -> dict[str, Any]:
    """Switches of torch that change how sums round."""
    return {
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def fact_differences(manifest: Manifest, facts: Facts) -> Iterator[ReportItem]:
    """Compare the facts in a manifest with those of the trainer that loads it.

    A fact that only one side knows is no difference.
    """
    yield from _compare("model", manifest.model, facts.model, Severity.REFUSE)
    yield from _compare("data", manifest.data, facts.data, Severity.REFUSE)
    yield from _compare("precision", manifest.precision, facts.precision, Severity.WARN)
    types = _types(manifest.optimizer)
    yield from _compare("optimizer", types, _types(facts.optimizer), Severity.REFUSE)
    now = software().model_dump()
    for name, version in manifest.software.model_dump().items():
        severity = Severity.WARN if name == "torch" else Severity.OK
        yield from _compare("software", {name: version}, now, severity)


def _types(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Groups are not compared here: the optimizer compares what it would take from them."""
    return {f"{key}.type": about.get("type") for key, about in facts.items()}


def _compare(
    kind: str, saved: Mapping[str, Any], now: Mapping[str, Any], severity: Severity
) -> Iterator[ReportItem]:
    for name in sorted(saved.keys() & now.keys()):
        if _plain(saved[name]) != _plain(now[name]):
            message = f"saved {saved[name]!r}, now {now[name]!r}"
            yield ReportItem(severity, kind, name, message)


def _plain(value: object) -> object:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
