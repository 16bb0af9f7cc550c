"""The trainer state of a trainer that measures on each rank for itself."""

from __future__ import annotations

from typing import ClassVar

from dcp_resume.manager.trainer_state import TrainerState

__all__ = ["LocalProgress"]


class LocalProgress(TrainerState):
    """Trainer state whose losses and metrics may differ between ranks; rank 0's are saved."""

    of_coordinator: ClassVar[tuple[str, ...]] = (
        *TrainerState.of_coordinator,
        *("metrics", "bests", "best_loss", "best_step"),
    )
