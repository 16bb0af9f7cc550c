"""Flat ZeRO buffers: other numbers of ranks, and an optimizer with whole tensors, read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcp_resume import (
    CheckpointManager,
    Declarations,
    Flat,
    Member,
    MeshPlace,
    SaveMode,
    Segment,
    Settings,
    Split,
)

pytestmark = pytest.mark.ranks

SHAPES = {"qkv.weight": (12, 5), "up.weight": (6, 4, 3), "norm.bias": (7,), "down.weight": (5, 8)}
DIMS = {"qkv.weight": 0, "up.weight": 1, "down.weight": 1}
PACKED = (Segment("q", 8), Segment("k", 4))
SLOTS = ("master", "exp_avg", "exp_avg_sq")


def whole(name: str, slot: str) -> torch.Tensor:
    seed = sum(map(ord, name + slot))
    return torch.rand(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def local(name: str, tensor: torch.Tensor, place: MeshPlace) -> torch.Tensor:
    """This rank's tensor-parallel shard, before the buffer is cut."""
    tp = place.split("tp")
    if name not in DIMS:
        return tensor
    if name == "qkv.weight":
        return torch.cat([run.chunk(tp.count)[tp.coordinate] for run in tensor.split([8, 4])])
    return tensor.chunk(tp.count, DIMS[name])[tp.coordinate]


def buffer_of(slot: str, place: MeshPlace) -> torch.Tensor:
    """This rank's range of all shards, end to end and filled up to whole eights a rank."""
    dp = place.split("dp")
    flat = torch.cat([local(name, whole(name, slot), place).reshape(-1) for name in SHAPES])
    length = -(-flat.numel() // (8 * dp.count)) * 8
    padding = torch.zeros(length * dp.count - flat.numel())
    return torch.cat([flat, padding]).chunk(dp.count)[dp.coordinate].clone()


def declarations_at(place: MeshPlace) -> Declarations:
    members = tuple(
        Member(name, tuple(local(name, whole(name, "master"), place).shape)) for name in SHAPES
    )
    layouts: dict[str, Any] = {
        f"zero.{slot}": Flat(members, ("dp",), f"optim.state.{{}}.{slot}") for slot in SLOTS
    }
    layouts |= {f"*{name}*": Split({"tp": dim}) for name, dim in DIMS.items() if dim == 1}
    layouts |= {"*qkv.weight*": Split({"tp": 0}, PACKED), "*norm.bias*": Split({})}
    return Declarations(mesh=place, layouts=layouts)


def manager(root: str, place: MeshPlace) -> CheckpointManager:
    declared = declarations_at(place)
    return CheckpointManager(
        root, Settings(mode=SaveMode.BLOCKING, deadline_s=60, declarations=declared)
    )


def place_of(dp: int, tp: int) -> MeshPlace:
    return MeshPlace.numbered({"dp": dp, "tp": tp}, dist.get_rank())


def save(root: str, dp: int, tp: int) -> None:
    place = place_of(dp, tp)
    with manager(root, place) as checkpoints:
        checkpoints.save(3, {"zero": {slot: buffer_of(slot, place) for slot in SLOTS}})


def load(root: str, dp: int, tp: int, resave: str) -> list[str]:
    """Buffers that are not this rank's range of the whole."""
    place = place_of(dp, tp)
    buffers = {slot: torch.zeros_like(buffer_of(slot, place)) for slot in SLOTS}
    with manager(root, place) as checkpoints:
        assert not [i for i in checkpoints.load({"zero": buffers}).report.items if i.severity]
    with manager(resave, place) as checkpoints:
        checkpoints.save(3, {"zero": buffers})
    return [s for s in SLOTS if not torch.equal(buffers[s], buffer_of(s, place))]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_flat_buffer_goes_from_2_ranks_to_4_to_1(ranks, tmp_path, tp):
    ranks.run(save, 2 * tp, str(tmp_path / "0"), 2, tp)
    for number, dp in enumerate((4, 1, 3)):
        paths = [str(tmp_path / str(n)) for n in (number, number + 1)]
        assert ranks.run(load, dp * tp, paths[0], dp, tp, paths[1]) == [[]] * (dp * tp)


def test_tensor_parallel_ranks_change_under_a_flat_buffer(ranks, tmp_path):
    ranks.run(save, 4, str(tmp_path / "0"), 2, 2)
    assert ranks.run(load, 4, str(tmp_path / "0"), 4, 1, str(tmp_path / "1")) == [[]] * 4
    assert ranks.run(load, 2, str(tmp_path / "1"), 1, 2, str(tmp_path / "2")) == [[]] * 2


class Whole(nn.Module):
    """The same parameters, whole, under the same names."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            holder, _, leaf = name.partition(".")
            module = nn.Module()
            module.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))
            self.add_module(holder, module)


def load_whole(root: str) -> list[str]:
    """Moments of an AdamW with whole tensors that differ from the buffers' members."""
    model = Whole()
    optimizer = torch.optim.AdamW(model.parameters())
    with CheckpointManager(root, Settings(deadline_s=60)) as checkpoints:
        checkpoints.load({"model": model, "optim": optimizer})
    return [
        f"{name}.{slot}"
        for name, parameter in model.named_parameters()
        for slot in SLOTS
        if not torch.equal(optimizer.state[parameter][slot], whole(name, slot))
        or optimizer.state[parameter]["step"] != 3
    ]


def save_with_model(root: str, dp: int, tp: int) -> None:
    place = place_of(dp, tp)
    model = {name: local(name, whole(name, "weight"), place) for name in SHAPES}
    options = torch.optim.AdamW(Whole().parameters()).param_groups[0]
    kept = {k: v for k, v in options.items() if k not in ("params", "foreach", "fused")}
    kept = {k: v for k, v in kept.items() if k not in ("capturable", "differentiable")}
    optim = {f"param_groups.{name}.{key}": v for name in SHAPES for key, v in kept.items()}
    optim |= {f"state.{name}.step": torch.tensor(3.0) for name in SHAPES}
    zero = {slot: buffer_of(slot, place) for slot in SLOTS}
    with manager(root, place) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optim, "zero": zero})


def test_an_optimizer_with_whole_tensors_takes_over_what_zero_saved(ranks, tmp_path):
    ranks.run(save_with_model, 4, str(tmp_path), 2, 2)
    assert ranks.run(load_whole, 1, str(tmp_path)) == [[]]
