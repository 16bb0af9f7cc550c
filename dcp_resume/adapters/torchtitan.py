"""``TorchtitanCheckpointer``: torchtitan's trainer saves to, and resumes from, a run of ours.

    config.checkpoint = TorchtitanCheckpointer.Config(enable=True, folder="s3://bucket/run")

or, without a change to any configuration:

    --override.imports dcp_resume.adapters.torchtitan.use_dcp_resume
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torchtitan.components.checkpointer import CheckpointManager as StockCheckpointer
from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    BaseCheckpointManager,
    ModelWrapper,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.override import derive, override
from torchtitan.tools import filesystem
from torchtitan.tools.logging import logger

from dcp_resume.adapters.torchtitan_state import Model, Optimizers, loader_state
from dcp_resume.adapters.torchtitan_stock import STEP_PATH, newest_first, to_be_imported
from dcp_resume.errors import ConfigurationError
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.manager.pending import PendingSave
from dcp_resume.manager.settings import SaveMode, Settings
from dcp_resume.session.load import LoadOptions

__all__ = ["TorchtitanCheckpointer", "use_dcp_resume"]

_MODES = {
    "disabled": SaveMode.BLOCKING,
    "async": SaveMode.BACKGROUND,
    "async_with_pinned_mem": SaveMode.LAZY,
}


class TorchtitanCheckpointer(BaseCheckpointManager):
    """A checkpointer of torchtitan's that keeps a run of this library.

    torchtitan builds it from its ``Config`` with what its own is built with. To set what torchtitan
    has no option for, such as signing, derive a class with a ``Config`` of its own and override
    ``make_settings``.

    Args:
        config: Options.
        dataloader: Of this data-parallel rank.
        model_parts: Of this rank, of which a pipeline has several.
        optimizers: All of this rank.
        lr_schedulers: Likewise.
        states: What else is saved, such as the trainer's step; the others are added to it.
        sd_adapter: Translates names for Hugging Face files.
        base_folder: Where a relative ``folder`` lies.

    Raises:
        ConfigurationError: A state to be left out of loads is none, or Hugging Face files are
            wanted without an adapter.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        """torchtitan's options, with the meaning that they have there."""

        async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
        """Saves that block, that are staged at once, or that are staged behind the next step's
        forward and backward."""

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        if not self.enable:
            return
        self.config = config
        self.folder = filesystem.join(base_folder, config.folder)
        self.save_future: PendingSave | None = None
        self.sd_adapter = sd_adapter
        self.states = states
        self._model = ModelWrapper(model_parts)
        self.states[MODEL] = Model(self._model)
        self.states[OPTIMIZER] = Optimizers(optimizers)
        self.states[LR_SCHEDULER] = lr_schedulers
        if dataloader is not None:
            self.states[DATALOADER] = loader_state(dataloader)
        self._check()
        self._pending: PendingSave | None = None
        self._manager = CheckpointManager(self.folder, self.make_settings(config))

    def make_settings(self, config: Config) -> Settings:
        """The settings of the run; override it for what torchtitan has no option for."""
        return Settings(
            save_interval=config.interval,
            max_checkpoint_keep=config.keep_latest_k,
            mode=_MODES[config.async_mode],
            load=LoadOptions(parts=self._parts_to_load()),
        )

    def _check(self) -> None:
        config = self.config
        unknown = sorted(set(config.exclude_from_loading) - set(self.states))
        if unknown:
            raise ConfigurationError(
                f"{unknown} cannot be left out of loads: the states are {sorted(self.states)}",
                option="checkpoint.exclude_from_loading",
            )
        if self.sd_adapter is None and (config.last_save_in_hf or config.initial_load_in_hf):
            raise ConfigurationError(
                "Hugging Face files are wanted, and the model has no state dict adapter",
                option="checkpoint.last_save_in_hf",
            )

    def _parts_to_load(self) -> tuple[str, ...] | None:
        left_out = self.config.exclude_from_loading
        return tuple(key for key in self.states if key not in left_out) if left_out else None

    # Loading.

    def _load(self, step: int = -1) -> bool:
        newest = self._manager.latest()
        if step == -1 and newest is None:
            self._refuse_stock_checkpoints()
            self._own()
            return self._load_initial()
        request = "latest" if step == -1 else step
        options = self._manager.settings.load
        if (newest if step == -1 else step) == 0:  # a seed: the model alone
            options = replace(options, parts=(MODEL,))
            self._manager.load(self.states, request, options=options)
        elif self.config.load_only:
            self._manager.load(self.states, request)
        else:
            self._manager.resume(self.states, request)
        return True

    def _own(self) -> None:
        """Take a new run over before its first step, so that two jobs do not train the same."""
        if not self.config.load_only:
            self._manager.resume(self.states)

    def _load_initial(self) -> bool:
        config, path = self.config, self.config.initial_load_path
        if config.initial_load_in_hf:
            self._load_hugging_face(path or self.sd_adapter.hf_assets_path)
        elif path:
            self._load_run(path)
        else:
            logger.info("No checkpoint was provided, this is a fresh start.")
            return False
        return True

    def _load_run(self, path: str) -> None:
        if filesystem.isfile(filesystem.join(path, ".metadata")):
            raise to_be_imported(path, None, "checkpoint.initial_load_path")
        match = STEP_PATH.fullmatch(path)
        run, step = (match["run"], int(match["step"])) if match else (path, "latest")
        parts = (MODEL,) if self.config.initial_load_model_only else self._parts_to_load()
        settings = self._manager.settings
        with CheckpointManager(run, settings) as source:
            source.load(self.states, step, options=replace(settings.load, parts=parts))

    def _refuse_stock_checkpoints(self) -> None:
        """Refuse to begin anew beside checkpoints that torchtitan's own checkpointer wrote."""
        if not filesystem.isdir(self.folder):
            return
        for name in newest_first(filesystem.listdir(self.folder)):
            path = filesystem.join(self.folder, name)
            if filesystem.isfile(filesystem.join(path, ".metadata")):
                raise to_be_imported(path, self.folder, "checkpoint.folder")

    # Saving.

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if self.config.load_only or not self._is_due(curr_step, last_step):
            return False
        self.maybe_wait_for_saving()
        if last_step and self.config.last_save_in_hf:
            self._save_hugging_face(curr_step)
            return True
        is_export = last_step and self.config.last_save_model_only
        state = {MODEL: self._exported()} if is_export else self.states
        self._pending = self._manager.save(curr_step, state)
        if last_step:
            self._pending.result()
        elif self._manager.settings.mode is not SaveMode.BLOCKING:
            self.save_future = self._pending
        return True

    def _is_due(self, step: int, last_step: bool) -> bool:
        is_first = step == 1 and self.config.enable_first_step_checkpoint
        return last_step or is_first or self._manager.should_save(step)

    def _exported(self) -> dict[str, Any]:
        dtype = TORCH_DTYPE_MAP[self.config.export_dtype]
        return {
            name: tensor.to(dtype)
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
            else tensor
            for name, tensor in self._model.state_dict().items()
        }

    def _maybe_wait_for_staging(self) -> None:
        if self._pending is not None:
            self._pending.wait_until_staged()

    def _wait_for_saving(self) -> None:
        pending, self.save_future = self._pending, None
        assert pending is not None
        pending.result()

    def _close(self) -> None:
        if hasattr(self, "_manager"):  # closed by a trainer whose checkpointer was refused
            self._manager.close()

    # Files of Hugging Face, which torchtitan reads and writes itself.

    def _load_hugging_face(self, path: str) -> None:
        states = self._model.state_dict()
        is_quantized = self.config.initial_load_in_hf_quantized
        self._stock().dcp_load(states, path, from_hf=True, from_quantized=is_quantized)

    def _save_hugging_face(self, step: int) -> None:
        stock = self._stock()
        path = filesystem.join(self.folder, f"step-{step}")
        stock.dcp_save(self._exported(), path, stock.async_mode, to_hf=True)

    def _stock(self) -> StockCheckpointer:
        config = derive(self.config, StockCheckpointer.Config, keep_latest_k=0)
        config.async_mode = "disabled"
        parts: Sequence[torch.nn.Module] = self._model.model
        return StockCheckpointer(
            config,
            dataloader=None,
            model_parts=parts,
            optimizers=None,
            lr_schedulers=None,
            states={},
            sd_adapter=self.sd_adapter,
        )


@override(
    target=StockCheckpointer.Config,
    exact=True,
    description="checkpoints in a run of dcp-resume",
)
def use_dcp_resume(config: StockCheckpointer.Config) -> TorchtitanCheckpointer.Config:
    """Replace torchtitan's checkpointer, with the same options.

    Args:
        config: Of torchtitan's own checkpointer.
    """
    replaced: TorchtitanCheckpointer.Config = derive(config, TorchtitanCheckpointer.Config)
    return replaced
