"""A small model under many layouts of ranks, whose whole state every rank knows without asking.

Parameters are a function of their names, and so are the gradients of two real AdamW steps: each
layout of torch's own (``parallelize_module``, ``fully_shard``, pipeline stages) must hold shards of
the tensors that ``whole_state`` computes on one rank. Sizes divide by nothing in particular, and
some shards are empty.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

__all__ = ["LAYOUTS", "Layout", "Trainee", "differences", "whole_state"]

NUM_LAYERS = 4


class Block(nn.Module):
    """Column-parallel, then row-parallel; the norm stays whole on every tensor-parallel rank."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.up = nn.Linear(7, 10)
        self.down = nn.Linear(10, 7)
        self.register_buffer("scale", torch.ones(3))


class Model(nn.Module):
    """The layers ``first`` to ``last``, under their global names."""

    def __init__(self, first: int = 0, last: int = NUM_LAYERS) -> None:
        super().__init__()
        if first == 0:
            self.embed = nn.Embedding(11, 7)
        self.layers = nn.ModuleDict({str(n): Block() for n in range(first, last)})
        if last == NUM_LAYERS:
            self.head = nn.Linear(7, 5)


def pattern(name: str, shape: torch.Size, salt: str) -> torch.Tensor:
    """A tensor that is a function of its name; no two elements of a small one are equal."""
    start = zlib.crc32(f"{salt}/{name}".encode()) % 9_973
    numbers = (torch.arange(shape.numel()) * 7 + start) % 9_973
    return (numbers.float() / 1_000 - 5).reshape(shape)


class Trainee:
    """One rank's model parts and optimizers, as a trainer would hold them.

    Args:
        parts: Model parts, not parallelised yet.
        parallelize: Makes the parts' parameters what the layout wants, in place.
        salt: Another salt is another model of the same shape.
        num_steps: AdamW steps to take; 0 leaves the optimizer without state.
    """

    def __init__(
        self,
        parts: list[Model],
        parallelize: Callable[[Model], object],
        salt: str = "a",
        num_steps: int = 2,
    ) -> None:
        self.parts = parts
        for part in parts:
            with torch.no_grad():
                for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                    tensor.copy_(pattern(name, tensor.shape, salt))
            parallelize(part)
        self.optimizers = [torch.optim.AdamW(p.parameters(), lr=0.01) for p in parts]
        for _ in range(num_steps):
            self.step()

    def step(self) -> None:
        """One optimizer step; the gradients are elementwise in the parameters."""
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            for name, parameter in part.named_parameters():
                shift = zlib.crc32(name.encode()) % 7 - 3
                parameter.grad = (parameter.detach() * 0.25 + shift).detach()
            optimizer.step()
            optimizer.zero_grad()

    @property
    def state(self) -> dict[str, Any]:
        """For ``CheckpointManager``."""
        return {"model": self.parts, "optim": self.optimizers}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the state with its FQN, by torch's own state dict helpers."""
        for part, optimizer in zip(self.parts, self.optimizers, strict=True):
            options = StateDictOptions(flatten_optimizer_state_dict=True)
            found = {
                "model": get_model_state_dict(part),
                "optim": get_optimizer_state_dict(part, optimizer, options=options),
            }
            for top, state in found.items():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        yield f"{top}.{name}", value

    def scramble(self) -> None:
        """Overwrite every tensor."""
        with torch.no_grad():
            for _, tensor in self.tensors():
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                local.fill_(-77.0)


def whole_state(salt: str = "a") -> dict[str, torch.Tensor]:
    """FQN → the whole tensor that every layout must hold shards of."""
    return {
        fqn: tensor.detach().clone()
        for fqn, tensor in Trainee([Model()], lambda part: None, salt).tensors()
    }


def differences(trainee: Trainee, expected: Mapping[str, torch.Tensor]) -> list[str]:
    """FQNs of this rank whose whole tensor, gathered by torch, is not bit-equal to the expected."""
    wrong = []
    for fqn, tensor in trainee.tensors():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(whole.detach(), expected[fqn]):
            wrong.append(fqn)
    return wrong


def _stage(index: int, count: int) -> Model:
    width = NUM_LAYERS // count
    return Model(index * width, (index + 1) * width)


def _tensor_parallel(mesh: DeviceMesh) -> Callable[[Model], object]:
    plan = {
        "embed": RowwiseParallel(),
        "layers.*.up": ColwiseParallel(),
        "layers.*.down": RowwiseParallel(),
        "head": ColwiseParallel(),
    }

    def apply(part: Model) -> None:
        names = {name for name, _ in part.named_children()}
        wanted = {key: style for key, style in plan.items() if key.split(".")[0] in names}
        parallelize_module(part, mesh, wanted)

    return apply


def _sharded(mesh: DeviceMesh) -> Callable[[Model], object]:
    def apply(part: Model) -> None:
        for layer in part.layers.values():
            fully_shard(layer, mesh=mesh)
        fully_shard(part, mesh=mesh)

    return apply


def _mesh(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def _single() -> tuple[Model, Callable[[Model], object]]:
    return Model(), lambda part: None


def _tp(size: int) -> tuple[Model, Callable[[Model], object]]:
    return Model(), _tensor_parallel(_mesh(tp=size))


def _fsdp(size: int) -> tuple[Model, Callable[[Model], object]]:
    return Model(), _sharded(_mesh(dp=size))


def _fsdp2_tp2() -> tuple[Model, Callable[[Model], object]]:
    mesh = _mesh(dp=2, tp=2)

    def apply(part: Model) -> None:
        _tensor_parallel(mesh["tp"])(part)
        _sharded(mesh["dp"])(part)

    return Model(), apply


def _hsdp2_2() -> tuple[Model, Callable[[Model], object]]:
    return Model(), _sharded(_mesh(replicate=2, shard=2))


def _hsdp2_2_tp2() -> tuple[Model, Callable[[Model], object]]:
    mesh = _mesh(replicate=2, shard=2, tp=2)

    def apply(part: Model) -> None:
        _tensor_parallel(mesh["tp"])(part)
        _sharded(mesh["replicate", "shard"])(part)

    return Model(), apply


def _pp2() -> tuple[Model, Callable[[Model], object]]:
    return _stage(dist.get_rank(), 2), lambda part: None


def _pp2_tp2() -> tuple[Model, Callable[[Model], object]]:
    mesh = _mesh(pp=2, tp=2)
    return _stage(mesh.get_local_rank("pp"), 2), _tensor_parallel(mesh["tp"])


def _dp2_tp2() -> tuple[Model, Callable[[Model], object]]:
    return Model(), _tensor_parallel(_mesh(dp=2, tp=2)["tp"])


@dataclass(frozen=True)
class Layout:
    """An arrangement of ranks."""

    name: str
    world_size: int
    make: Callable[[], tuple[Model, Callable[[Model], object]]]

    def build(self, salt: str = "a", num_steps: int = 2) -> Trainee:
        """This rank's share; call it on every rank of a group of ``world_size``."""
        part, parallelize = self.make()
        return Trainee([part], parallelize, salt, num_steps)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("single", 1, _single),
        Layout("tp2", 2, lambda: _tp(2)),
        Layout("tp4", 4, lambda: _tp(4)),
        Layout("fsdp2", 2, lambda: _fsdp(2)),
        Layout("fsdp4", 4, lambda: _fsdp(4)),
        Layout("fsdp2_tp2", 4, _fsdp2_tp2),
        Layout("hsdp2_2", 4, _hsdp2_2),
        Layout("hsdp2_2_tp2", 8, _hsdp2_2_tp2),
        Layout("pp2", 2, _pp2),
        Layout("pp2_tp2", 4, _pp2_tp2),
        Layout("dp2_tp2", 4, _dp2_tp2),
    )
}
