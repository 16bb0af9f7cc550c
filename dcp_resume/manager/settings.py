"""Every option of a ``CheckpointManager``, with its unit, default and check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.policies import KeepAll, KeepLast, RetentionPolicy
from dcp_resume.manager.stateful import OptimizerState
from dcp_resume.manifest.signing import Signing
from dcp_resume.planning.declarations import Declarations
from dcp_resume.session.load import LoadOptions
from dcp_resume.session.tensor_digests import TensorDigests
from dcp_resume.session.unchanged import Unchanged
from dcp_resume.storage import RetryPolicy

__all__ = ["SaveMode", "Settings", "WhenBusy"]


class SaveMode(Enum):
    """When ``save`` returns."""

    BLOCKING = "blocking"
    """When the checkpoint is committed; no staging copy is made."""
    BACKGROUND = "background"
    """When the state is copied; writing and commit go on in a thread."""
    LAZY = "lazy"
    """When all is copied but what only optimizers' steps change; that follows in a thread, or
    before the next step."""


class WhenBusy(Enum):
    """What a save does while another one is still running."""

    WAIT = "wait"
    REFUSE = "refuse"
    """Raise ``SaveInProgress``, alike on all ranks."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Options, checked together at construction.

    Raises:
        ConfigurationError: An option, or a combination, that cannot work.
    """

    save_interval: int = 0
    """Steps between saves for ``should_save``; 0 saves only when asked."""
    max_checkpoint_keep: int = 0
    """Short for ``retention=KeepLast(…)``: checkpoints that remain after a commit; 0 keeps all."""
    retention: RetentionPolicy = field(default_factory=KeepAll)
    """Which checkpoints remain after a commit; the others are deleted in the background."""
    save_optimizer_state: OptimizerState = OptimizerState.AS_GIVEN
    load_optimizer_state: OptimizerState = OptimizerState.AS_GIVEN
    mode: SaveMode = SaveMode.BACKGROUND
    when_busy: WhenBusy = WhenBusy.WAIT
    deadline_s: float = 1800.0
    """Seconds after which a save or load fails on every rank that still waits for another."""
    declarations: Declarations = field(default_factory=Declarations)
    tensor_digests: TensorDigests = TensorDigests.OMIT
    unchanged: Unchanged = Unchanged.WRITE
    """What a save does with chunks that are as they were in the newest checkpoint."""
    load: LoadOptions = field(default_factory=LoadOptions)
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Passed to the file system: endpoint, credentials, profile; never shown."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    signing: Signing = field(default_factory=Signing)
    """How what the run writes is signed, and whose checkpoints are loaded."""
    monitor: str = "loss"
    """Metric of the trainer state that ``best`` compares."""
    monitor_mode: str = "min"
    """``min`` or ``max``."""

    def __post_init__(self) -> None:
        if self.save_interval < 0:
            raise _wrong("save_interval", self.save_interval, "0 or more steps")
        if self.max_checkpoint_keep < 0:
            raise _wrong("max_checkpoint_keep", self.max_checkpoint_keep, "0 or more checkpoints")
        if self.max_checkpoint_keep and self.retention != KeepAll():
            raise ConfigurationError(
                f"max_checkpoint_keep={self.max_checkpoint_keep} and retention={self.retention} "
                "are both given, and one would undo the other. Give retention alone: "
                f"KeepLast({self.max_checkpoint_keep}) | …",
                option="retention",
            )
        if self.deadline_s <= 0:
            raise _wrong("deadline_s", self.deadline_s, "more than 0 seconds")
        if self.monitor_mode not in ("min", "max"):
            raise _wrong("monitor_mode", self.monitor_mode, "'min' or 'max'")

    @property
    def retention_policy(self) -> RetentionPolicy:
        """The policy that ``max_checkpoint_keep`` or ``retention`` asks for."""
        if self.max_checkpoint_keep:
            return KeepLast(self.max_checkpoint_keep)
        return self.retention


def _wrong(option: str, value: object, expected: str) -> ConfigurationError:
    return ConfigurationError(f"{option} must be {expected}, got {value!r}", option=option)
