"""Libraries that take part where they are installed, behind the contenders' verbs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.contenders import flat, local
from benchmarks.payload import State
from benchmarks.trainer import as_trainer

__all__ = ["ByteCheckpoint", "MegatronCore", "TorchSnapshot"]


class _WithProcesses:
    """A library that starts processes of its own, which ranks of the pool may not."""

    def __init__(self) -> None:
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]

    def close(self) -> None:
        """End its processes: nobody else would."""
        for child in multiprocessing.active_children():
            child.kill()
            child.join()


class TorchSnapshot:
    """torchsnapshot; its releases know no DTensor, so each rank's tensors are its own.

    It calls no fsync.
    """

    is_async = True
    reshards = False

    def prepare(self, state: State) -> dict[str, Any]:
        """Its own kind of state."""
        return {"state": self._module().StateDict(**local(state))}

    def save(self, prepared: dict[str, Any], path: Path) -> None:
        """Take a snapshot."""
        self._module().Snapshot.take(str(path), prepared)

    def save_async(self, prepared: dict[str, Any], path: Path) -> Callable[[], object]:
        """Take a snapshot in the background."""
        pending = self._module().Snapshot.async_take(str(path), prepared)
        waits: Callable[[], object] = pending.wait
        return waits

    def load(self, prepared: dict[str, Any], path: Path) -> None:
        """Restore in place."""
        self._module().Snapshot(str(path)).restore(prepared)

    def close(self) -> None:
        """Nothing is kept."""

    def _module(self) -> Any:
        import torchsnapshot

        return torchsnapshot


class ByteCheckpoint(_WithProcesses):
    """bytecheckpoint, by its door for FSDP2; its asynchronous one waits all the same."""

    is_async = False
    reshards = True

    def prepare(self, state: State) -> dict[str, Any]:
        """A model and its optimizer."""
        trainer = as_trainer(state)
        return {"model": trainer["model"], "optimizer": trainer["optim"]}

    def save(self, prepared: dict[str, Any], path: Path) -> None:
        """Save a model and its optimizer."""
        import bytecheckpoint

        bytecheckpoint.save(str(path), prepared, framework="fsdp2")

    def save_async(self, prepared: dict[str, Any], path: Path) -> Callable[[], object]:
        """There is none."""
        raise NotImplementedError

    def load(self, prepared: dict[str, Any], path: Path) -> None:
        """Load in place."""
        import bytecheckpoint

        bytecheckpoint.load(str(path), prepared, framework="fsdp2")


class MegatronCore(_WithProcesses):
    """megatron-core's dist_checkpointing, in its format on torch.distributed.checkpoint."""

    is_async = False
    reshards = True

    def __init__(self) -> None:
        super().__init__()
        if (
            not torch.cuda.is_available()
        ):  # it asks for a device before it asks whether there is one
            torch.cuda.synchronize = lambda device=None: None
            torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]

    def prepare(self, state: State) -> dict[str, Any]:
        """Its sharded tensors."""
        return _sharded(state)

    def save(self, prepared: dict[str, Any], path: Path) -> None:
        """Save sharded tensors."""
        from megatron.core import dist_checkpointing

        path.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(dict(prepared), str(path))

    def save_async(self, prepared: dict[str, Any], path: Path) -> Callable[[], object]:
        """Its own needs a CUDA device."""
        raise NotImplementedError

    def load(self, prepared: dict[str, Any], path: Path) -> None:
        """Load, and copy what was not loaded in place."""
        from megatron.core import dist_checkpointing

        loaded = dist_checkpointing.load(dict(prepared), str(path))
        for name, sharded in prepared.items():
            if loaded[name].data_ptr() != sharded.data.data_ptr():
                sharded.data.copy_(loaded[name])


def _sharded(state: State) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, ranks = dist.get_rank(), dist.get_world_size()
    sharded: dict[str, Any] = {}
    for name, tensor in flat(state).items():
        placement = tensor.placements[0] if isinstance(tensor, DTensor) else Replicate()
        memory = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = [(placement.dim, rank, ranks)] if isinstance(placement, Shard) else []
        sharded[name] = ShardedTensor.from_rank_offsets(
            name, memory, *place, replica_id=0 if place else rank
        )
    return sharded
