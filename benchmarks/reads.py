"""Bytes fetched for bytes needed, when other ranks load: rows, and columns of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks.cost import measure
from benchmarks.libraries import CONTENDERS
from benchmarks.names import FETCHED, LOADING, ON_COLUMNS, ON_ROWS, SAVING
from benchmarks.options import Options, on_ranks
from benchmarks.samples import Figure, Findings

__all__ = ["measure_reads"]

_LIBRARIES = ("dcp_resume", "dcp")
_SHAPE = (24_876, 1024)
"""float32: a third is 32 blocks of 1 MiB and a bit, which starts and ends within blocks."""


def measure_reads(options: Options) -> Iterator[Findings]:
    """Save on 2 ranks in rows; load on 3, in rows and in columns."""
    figures: list[Figure] = []
    for library in options.among(_LIBRARIES):
        with options.scratch("reads") as directory:
            on_ranks(_save, SAVING, library, str(directory))
            for operation, dim in ((ON_ROWS, 0), (ON_COLUMNS, 1)):
                fetched = on_ranks(_load, LOADING, library, str(directory), dim)
                figures.append(Figure("rows", operation, library, FETCHED, fetched))
    yield Findings("reads", "rows", SAVING, 4 * _SHAPE[0] * _SHAPE[1], others=figures)


def _save(library: str, directory: str) -> None:
    contender = CONTENDERS[library]()
    contender.save(contender.prepare({"model": {"weight": _sharded(_whole(), 0)}}), Path(directory))
    contender.close()


def _load(library: str, directory: str, dim: int) -> float:
    contender, target = CONTENDERS[library](), _sharded(torch.zeros(_SHAPE), dim)
    prepared = contender.prepare({"model": {"weight": target}})
    cost = measure(lambda: contender.load(prepared, Path(directory)))
    contender.close()
    if not torch.equal(target.to_local(), _sharded(_whole(), dim).to_local()):
        raise ValueError(f"{library} loaded other values than it saved")
    return cost.read_bytes / (4 * _SHAPE[0] * _SHAPE[1])


def _whole() -> torch.Tensor:
    return torch.randn(_SHAPE, generator=torch.Generator().manual_seed(1))


def _sharded(whole: torch.Tensor, dim: int) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    return distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
