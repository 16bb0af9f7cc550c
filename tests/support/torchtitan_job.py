"""One rank of a job of torchtitan's own trainer and debug model, on a CPU.

    python -m tests.support.torchtitan_job '{"folder": …, "losses": …, …}'

torchtitan knows accelerators alone. A CPU stands in for one here: its memory is not measured, and
attention is the plain one, because the flexible kind has no backward on CPUs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torchtitan.tools.utils as titan_utils
from torch.distributed.fsdp import FSDPModule

__all__ = ["Job"]


class CpuDevice:
    """What torchtitan asks the module of an accelerator."""

    memory_stats = staticmethod(lambda device: {})
    empty_cache = reset_peak_memory_stats = synchronize = staticmethod(lambda: None)
    set_device = staticmethod(lambda device: None)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda device: "CPU")
    get_device_properties = staticmethod(lambda device: SimpleNamespace(total_memory=1 << 34))


titan_utils.device_type, titan_utils.device_module = "cpu", CpuDevice
if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3 was written for torch 2.14
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout

from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.config.configs import CommConfig, DebugConfig  # noqa: E402
from torchtitan.config.override import OverrideConfig  # noqa: E402
from torchtitan.models.common.attention import (  # noqa: E402
    FlexAttention,
    ScaledDotProductAttention,
)
from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

VOCABULARY = 2048
TAKE_OVER = "dcp_resume.adapters.torchtitan.use_dcp_resume"


@dataclass
class Job:
    """What a job is told."""

    folder: str
    losses: str
    """Where rank 0 notes ``[step, loss in hexadecimal]``, a line a step."""
    dump: str
    steps: int = 6
    seed: int = 1
    checkpoint: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, Any] = field(default_factory=dict)
    killed_at: int = 0
    """Step after which every rank kills itself; 0 for none."""
    is_stock: bool = False
    """Whether torchtitan's own checkpointer does the work."""


class Tokens(torch.utils.data.IterableDataset):
    """Random documents, of which each rank has its own, with a place that can be saved."""

    def __init__(self, seq_len: int, rank: int) -> None:
        self._seq_len, self._rank, self._next = seq_len, rank, 0

    def __iter__(self):
        while True:
            source = torch.Generator().manual_seed(1000 * self._rank + self._next)
            row = torch.randint(0, VOCABULARY, (self._seq_len + 1,), generator=source)
            self._next += 1
            positions = torch.arange(self._seq_len)
            yield {"input": row[:-1], "positions": positions}, row[1:]

    def state_dict(self):
        return {"next": self._next}

    def load_state_dict(self, state):
        self._next = state["next"]


class TokenLoader(ParallelAwareDataloader):
    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        pass

    def __init__(self, config, *, dp_world_size, dp_rank, seq_len, local_batch_size, **kwargs):
        super().__init__(
            Tokens(seq_len, dp_rank),
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            snapshot_every_n_steps=kwargs["snapshot_every_n_steps"],
        )


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, *, tokenizer_path):
        super().__init__()

    def encode(self, *args, **kwargs):
        raise NotImplementedError

    decode = encode

    def get_vocab_size(self):
        return VOCABULARY


class Notes(MetricsProcessor):
    """Notes each loss, and cuts the job off where it was told to."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        losses: str
        killed_at: int

    def log(self, step, global_avg_loss, *args, **kwargs):
        super().log(step, global_avg_loss, *args, **kwargs)
        # The last rank has the loss, also of a pipeline.
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            with open(self.config.losses, "a") as file:
                print(json.dumps([step, float(global_avg_loss).hex()]), file=file, flush=True)
        if step == self.config.killed_at:
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_config(job: Job) -> Trainer.Config:
    spec = model_registry("debugmodel")
    for _, _, parent, name in spec.model.traverse(FlexAttention.Config):
        setattr(parent, name, ScaledDotProductAttention.Config())
    return Trainer.Config(
        loss=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY),
        model_spec=spec,
        tokenizer=NoTokenizer.Config(),
        dump_folder=job.dump,
        optimizer=default_adamw(lr=8e-4, fused=False, foreach=True),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.8),
        training=TrainingConfig(
            local_batch_size=2,
            seq_len=64,
            steps=job.steps,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
        ),
        dataloader=TokenLoader.Config(),
        metrics=Notes.Config(log_freq=1, losses=job.losses, killed_at=job.killed_at),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **job.parallelism),
        checkpoint=CheckpointManager.Config(
            **{
                "enable": True,
                "folder": job.folder,
                "last_save_model_only": False,
                **job.checkpoint,
            }
        ),
        activation_checkpoint=None,
        comm=CommConfig(trace_buf_size=0),
        debug=DebugConfig(seed=job.seed, enable_structured_logging=False),
        override=OverrideConfig(imports=[] if job.is_stock else [TAKE_OVER]),
    )


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    torch.distributed.init_process_group("gloo")
    trainer = trainer_config(job).build()
    for part in trainer.model_parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    try:
        trainer.train()
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
