"""What the manifest says of a training beside its tensors, put together from all who know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dcp_resume.manager.arrangement import num_virtual_stages
from dcp_resume.manager.drift import optimizer_facts, precision_facts
from dcp_resume.manager.trainer_state import trainer_facts
from dcp_resume.session.documents import Facts

__all__ = ["collect_facts"]


def collect_facts(given: Facts, step: int, state: Mapping[str, Any]) -> Facts:
    """The facts of a save or a load.

    Args:
        given: What the caller said once, of model, data, precision and the job.
        step: Optimizer steps completed.
        state: As handed to ``save`` or ``load``.
    """
    return replace(
        given,
        trainer=trainer_facts(step, state),
        virtual_stages=num_virtual_stages(state),
        optimizer=optimizer_facts(state),
        precision={**precision_facts(), **given.precision},
    )
