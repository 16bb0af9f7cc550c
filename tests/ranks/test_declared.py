"""Megatron-like local tensors, declared: saved on one mesh, loaded on others, with moments."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcp_resume import (
    CheckpointManager,
    Declarations,
    MeshPlace,
    OptimizerState,
    SaveMode,
    Segment,
    Settings,
    Split,
    errors,
)
from tests.ranks.test_agreement import error_of

pytestmark = pytest.mark.ranks

HEADS, KV_HEADS, HEAD, WIDTH, EXPERTS = 8, 2, 4, 16, 4
MHA = tuple(Segment(name=n, size=HEADS * HEAD, units=HEADS) for n in "qkv")
GQA = (
    Segment(name="q", size=HEADS * HEAD, units=HEADS),
    Segment(name="k", size=KV_HEADS * HEAD, units=KV_HEADS),
    Segment(name="v", size=KV_HEADS * HEAD, units=KV_HEADS),
)
SPLITS = {
    "*column.weight*": Split({"tp": 0}),
    "*row.weight*": Split({"tp": 1}),
    "*mha.weight*": Split({"tp": 0}, MHA),
    "*gqa.weight*": Split({"tp": 0}, GQA),
    "*experts*": Split({"ep": 0, "tp": 2}),
    "*norm*": Split({}),
}
SHAPES = {
    "column.weight": (24, WIDTH),
    "row.weight": (WIDTH, 24),
    "mha.weight": (3 * HEADS * HEAD, WIDTH),
    "gqa.weight": ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH),
    "experts": (EXPERTS, WIDTH, 8),
    "norm": (WIDTH,),
}
SLOTS = ("", ".exp_avg", ".exp_avg_sq")


def reference(name: str, slot: str = "") -> torch.Tensor:
    """The whole tensor in the order that an unsharded model has it."""
    generator = torch.Generator().manual_seed(len(name) * 31 + len(slot))
    return torch.rand(SHAPES[name], generator=generator)


def piece(name: str, whole: torch.Tensor, place: MeshPlace) -> torch.Tensor:
    """This rank's part, cut as Megatron does it: by head, by row, by expert."""
    sizes = dict(zip(place.axes, zip(place.shape, place.coordinate, strict=True), strict=True))
    tp, at = sizes["tp"]
    if name in ("column.weight", "norm"):
        return whole.chunk(tp, 0)[at] if name == "column.weight" else whole
    if name == "row.weight":
        return whole.chunk(tp, 1)[at]
    if name == "experts":
        ep, ep_at = sizes["ep"]
        return whole.chunk(ep, 0)[ep_at].chunk(tp, 2)[at]
    kv = HEADS if name == "mha.weight" else KV_HEADS
    q, k, v = whole.split([HEADS * HEAD, kv * HEAD, kv * HEAD])
    own_kv = at * kv // tp if kv < tp else at
    parts = [q.chunk(tp)[at], k.chunk(min(kv, tp))[own_kv], v.chunk(min(kv, tp))[own_kv]]
    return torch.cat(parts)


class Local(nn.Module):
    """Plain local tensors, as parameters."""

    def __init__(self, place: MeshPlace, fill: Any) -> None:
        super().__init__()
        for name in SHAPES:
            holder, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(piece(name, fill(name), place).clone())
            if holder:
                self.add_module(holder, nn.Module())
                getattr(self, holder).register_parameter(leaf, parameter)
            else:
                self.register_parameter(leaf, parameter)


def place_of(tp: int, ep: int) -> MeshPlace:
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    dp = world_size // (tp * ep)
    coordinate = (rank // (tp * ep), rank // tp % ep, rank % tp)
    return MeshPlace(("dp", "ep", "tp"), (dp, ep, tp), coordinate)


def manager(root: str, place: MeshPlace, splits: Any = SPLITS) -> CheckpointManager:
    declared = Declarations(mesh=place, layouts=splits)
    settings = Settings(mode=SaveMode.BLOCKING, deadline_s=60, declarations=declared)
    return CheckpointManager(root, settings)


def save_on(root: str, tp: int, ep: int) -> None:
    place = place_of(tp, ep)
    model = Local(place, reference)
    optimizer = torch.optim.AdamW(model.parameters())
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(7.0),
            "exp_avg": piece(name, reference(name, ".exp_avg"), place).clone(),
            "exp_avg_sq": piece(name, reference(name, ".exp_avg_sq"), place).clone(),
        }
    with manager(root, place) as checkpoints:
        checkpoints.save(7, {"model": model, "optim": optimizer})


def load_on(root: str, tp: int, ep: int, resave: str = "") -> list[str]:
    """Names of what differs from this rank's piece of the reference."""
    place = place_of(tp, ep)
    model = Local(place, lambda name: torch.zeros(SHAPES[name]))
    optimizer = torch.optim.AdamW(model.parameters())
    with manager(root, place) as checkpoints:
        checkpoints.resume({"model": model, "optim": optimizer})
    if resave:
        with manager(resave, place) as checkpoints:
            checkpoints.save(7, {"model": model, "optim": optimizer})
    wrong = []
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        found = {"": parameter, ".exp_avg": state["exp_avg"], ".exp_avg_sq": state["exp_avg_sq"]}
        for slot, tensor in found.items():
            if not torch.equal(tensor, piece(name, reference(name, slot), place)):
                wrong.append(name + slot)
        if state["step"] != 7:
            wrong.append(f"{name}.step")
    return wrong


def test_43_44_declared_shards_go_from_tp_2_to_4_to_2_to_1_with_moments(ranks, tmp_path):
    """INFINITRAIN 43, 44: packed QKV, MHA and GQA (2 key-value heads, also under TP 4)."""
    first, second, third = (str(tmp_path / name) for name in "abc")
    ranks.run(save_on, 4, first, 2, 2)
    assert ranks.run(load_on, 4, first, 4, 1, second) == [[]] * 4
    assert ranks.run(load_on, 2, second, 2, 1, third) == [[]] * 2
    for root in (first, second, third):
        assert ranks.run(load_on, 1, root, 1, 1) == [[]]
        assert ranks.run(load_on, 4, root, 1, 4) == [[]] * 4


def load_plain(root: str) -> list[str]:
    state = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    with CheckpointManager(
        root, Settings(load_optimizer_state=OptimizerState.LEFT_OUT)
    ) as checkpoints:
        checkpoints.load({"model": state})
    return [name for name, tensor in state.items() if not torch.equal(tensor, reference(name))]


def test_44_what_was_declared_loads_as_the_unsharded_reference(ranks, tmp_path):
    ranks.run(save_on, 4, str(tmp_path), 4, 1)
    assert ranks.run(load_plain, 1, str(tmp_path)) == [[]]
    [path] = tmp_path.glob("step-*/*/catalog.json")
    entries = {e["fqn"]: e for e in json.loads(path.read_text())["tensors"]}
    gqa = entries["optim.state.gqa.weight.exp_avg"]
    assert gqa["rule"] == {"tp": 0}
    assert [(s["name"], s["size"], s["units"]) for s in gqa["segments"]] == [
        ("q", 32, 8),
        ("k", 8, 2),
        ("v", 8, 2),
    ]
    assert entries["model.norm"]["kind"] == "replicated"
    assert entries["optim.state.gqa.weight.step"]["rule"] == {}


def load_undeclared(root: str, splits: Any) -> Any:
    place = place_of(2, 1)
    model = Local(place, lambda name: torch.zeros(SHAPES[name]))
    with manager(root, place, splits) as checkpoints:
        error = error_of(lambda: checkpoints.load({"model": model}))
    return error, sum(float(p.abs().sum()) for p in model.parameters())


def test_other_segments_are_refused_before_a_row_lands_in_another_place(ranks, tmp_path):
    ranks.run(save_on, 2, str(tmp_path), 2, 1)
    blind = {**SPLITS, "*gqa.weight*": Split({"tp": 0})}
    blind["*mha.weight*"] = Split({"tp": 0}, (Segment(name="all", size=3 * HEADS * HEAD),))
    for error, changed in ranks.run(load_undeclared, 2, str(tmp_path), blind):
        assert isinstance(error, errors.LoadRefused)
        kinds = {p.where: p.kind for p in error.problems if p.kind == "segments"}
        assert kinds == {"model.gqa.weight": "segments", "model.mha.weight": "segments"}
        assert changed == 0


def save_wrong(root: str, splits: Any) -> Any:
    place = place_of(2, 1)
    model = Local(place, reference)
    with manager(root, place, splits) as checkpoints:
        return error_of(lambda: checkpoints.save(1, {"model": model}))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("*gqa.weight*", Split({"tp": 0}, MHA), "gives this rank"),
        ("*column.weight*", Split({"cp": 0}), "names the mesh axis 'cp'"),
        ("*gqa.weight*", Split({"tp": 0}, (Segment(name="q", size=48, units=3),)), "evenly"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_at_save(ranks, tmp_path, name, split, message):
    for error in ranks.run(save_wrong, 2, str(tmp_path), {**SPLITS, name: split}):
        assert message in str(error)


def save_local_layers(root: str) -> Any:
    """Two pipeline stages that both call their own layers 0 and 1."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    model = {f"layers.{n}.weight": torch.rand(4, 4, generator=generator) for n in range(2)}
    model |= {f"layers.{n}.norm": torch.ones(4) for n in range(2)}
    with CheckpointManager(root, Settings(mode=SaveMode.BLOCKING, deadline_s=60)) as checkpoints:
        return error_of(lambda: checkpoints.save(1, {"model": model}))


def test_45_one_name_for_different_layers_on_two_stages_is_refused(ranks, tmp_path):
    """INFINITRAIN 45; what the two have in common by chance does not hide it."""
    for error in ranks.run(save_local_layers, 2, str(tmp_path)):
        assert isinstance(error, errors.ReplicaMismatch)
        assert {p.where for p in error.problems} == {
            "model.layers.0.weight",
            "model.layers.1.weight",
        }
