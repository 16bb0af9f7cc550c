"""The progress of a trainer that has a loop of its own, and measures on each rank for itself."""

from __future__ import annotations

from typing import ClassVar

from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.settings import Settings
from dcp_resume.manager.trainer_state import TrainerState

__all__ = ["LocalProgress", "refuse_selected_parts"]


class LocalProgress(TrainerState):
    """Trainer state whose losses and metrics may differ between ranks; rank 0's are saved."""

    of_coordinator: ClassVar[tuple[str, ...]] = (
        *TrainerState.of_coordinator,
        *("metrics", "bests", "best_loss", "best_step"),
    )


def refuse_selected_parts(settings: Settings) -> None:
    """Refuse to resume some parts alone: the loop would go on without its own place.

    Raises:
        ConfigurationError: ``settings.load.parts`` names parts.
    """
    if settings.load.parts is not None:
        raise ConfigurationError(
            f"a trainer resumes all parts, and load.parts is {settings.load.parts}: to begin a new "
            f"run with them, give it another root, and before training call load() of a "
            f"CheckpointManager of the old one, with these LoadOptions",
            option="load.parts",
        )
