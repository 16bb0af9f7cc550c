"""LoRA: what a second save writes of a state in which only the adapters have changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.cost import measure
from benchmarks.names import SECOND_SAVE, WRITTEN
from benchmarks.options import Options, on_ranks
from benchmarks.payload import SIZES, Size, State, make_state, memory_of
from benchmarks.samples import Figure, Findings
from dcp_resume import CheckpointManager, SaveMode, Settings, Unchanged

__all__ = ["measure_incremental"]

_RANKS = 2
_WIDTH = 16
"""Of the adapters."""


def measure_incremental(options: Options) -> Iterator[Findings]:
    """Save, change the adapters and their moments, save again."""
    size = options.size("one-rank")
    figures: list[Figure] = []
    label = options.label("LoRA")
    num_bytes = 0
    for library in options.among(_SAVES):
        with options.scratch("incremental") as directory:
            given = (size.name, str(directory))
            written, changed, num_bytes = on_ranks(_SAVES[library], _RANKS, *given)
        figures.append(Figure(label, SECOND_SAVE, library, WRITTEN, written / changed))
    yield Findings("incremental", label, _RANKS, num_bytes, others=figures)


def _save_ours(size: str, directory: str) -> tuple[int, int, int]:
    state = _frozen_and_adapters(SIZES[size])
    settings = Settings(mode=SaveMode.BLOCKING, unchanged=Unchanged.REFER)
    with CheckpointManager(directory, settings) as checkpoints:
        checkpoints.save(1, state)
        changed = _change(state["adapters"])
        cost = measure(lambda: checkpoints.save(2, state))
    return cost.written_bytes, changed, _over_ranks(state)


def _save_dcp(size: str, directory: str) -> tuple[int, int, int]:
    state = _frozen_and_adapters(SIZES[size])
    dcp.save(state, checkpoint_id=Path(directory) / "1")
    changed = _change(state["adapters"])
    cost = measure(lambda: dcp.save(state, checkpoint_id=Path(directory) / "2"))
    return cost.written_bytes, changed, _over_ranks(state)


def _frozen_and_adapters(size: Size) -> State:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    adapters: State = {}
    for fqn, (shape, dim) in size.shapes().items():
        if "attention.w" in fqn and dim is not None:
            pair = {"A": (_WIDTH, shape[1]), "B": (shape[0], _WIDTH)}
            adapters[fqn] = {
                f"{name}.{kind}": _sharded(own, mesh)
                for name, own in pair.items()
                for kind in ("weight", "exp_avg", "exp_avg_sq")
            }
    return {"model": make_state(size, mesh, seed=1)["model"], "adapters": adapters}


def _sharded(shape: tuple[int, int], mesh: DeviceMesh) -> DTensor:
    local = torch.randn(shape[0] // mesh.size(), shape[1])
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)


def _change(state: State) -> int:
    """Change all of it; its bytes over all ranks."""
    for tensor in memory_of(state):
        tensor.add_(1)
    return _over_ranks(state)


def _over_ranks(state: State) -> int:
    every: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(every, sum(tensor.nbytes for tensor in memory_of(state)))
    return sum(every)


_SAVES = {"dcp_resume": _save_ours, "dcp": _save_dcp}
