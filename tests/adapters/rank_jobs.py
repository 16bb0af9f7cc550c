"""What each rank of a pool does: a peer's training, whole, and stopped and resumed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dcp_resume import Declarations


@contextlib.contextmanager
def launched():
    """The environment that torchrun would have set for this rank of the pool's group."""
    before = dict(os.environ)
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size)
    os.environ.update(LOCAL_WORLD_SIZE=world_size, GROUP_RANK="0", TORCHELASTIC_RUN_ID="pool")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # the group exists already
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def three_runs(job_of: Any, root: str, stop_after: int) -> tuple[Any, Any, Any]:
    """Straight, stopped, and resumed."""
    straight = job_of(Path(root) / "straight").run()
    job = job_of(Path(root) / "stopped")
    return straight, job.run(stop_after), job.run()


def lightning_runs(root: str) -> Any:
    from tests.adapters.lightning_job import Job

    options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2}
    statistics = dict.fromkeys(("model.layers.2.running_mean", "model.layers.2.running_var"), 0)
    settings = {"declarations": Declarations(from_rank=statistics)}  # as DDP's next forward does
    with launched():
        return three_runs(lambda place: Job(place, 2, options, settings=settings), root, 5)


def fsdp_runs(root: str) -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    from tests.adapters.lightning_job import Job, Sharded

    def strategy() -> Any:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    def job_of(place: Path) -> Any:
        options = {"devices": 2}
        return Job(place, 2, options, validates=False, model=Sharded, strategy=strategy)

    with launched():
        return three_runs(job_of, root, 7)


def hf_runs(root: str) -> Any:
    from tests.adapters.hf_job import Job

    with launched():
        return three_runs(lambda place: Job(place, {"save_steps": 2}), root, 7)


def accelerate_runs(root: str) -> Any:
    from tests.adapters.accelerate_job import Job

    with launched():
        return three_runs(lambda place: Job(place, 2), root, 7)


def accelerate_stopped(root: str, save_interval: int, stop_after: int) -> None:
    from tests.adapters.accelerate_job import Job

    with launched():
        Job(Path(root), save_interval).run(stop_after)


def accelerate_resumed(root: str) -> Any:
    from tests.adapters.accelerate_job import Job

    with launched():
        return Job(Path(root), 1000).run()
