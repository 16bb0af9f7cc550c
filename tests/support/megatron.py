"""A Megatron-like model in numbers: whole tensors, and the pieces that ranks of a topology hold.

Pieces are cut by hand (by head, by row, by stage), so that what a layout declares has a judge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dcp_resume import Declarations, MeshPlace, Padding, Segment, Split

__all__ = ["SLOTS", "Topology", "declarations", "padded", "piece", "state_of", "whole"]

VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD, EXPERTS, LAYERS = 50257, 4, 8, 2, 2, 4, 4
SLOTS = ("", ".exp_avg", ".exp_avg_sq")
SHAPES = {
    "column.weight": (24, WIDTH),
    "column.bias": (24,),
    "row.weight": (WIDTH, 24),
    "mha.weight": (3 * HEADS * HEAD, WIDTH),
    "gqa.weight": ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH),
    "gate_up": (EXPERTS, 2 * 8, WIDTH),
    "norm.weight": (WIDTH,),
}


def _packed(kv_heads: int) -> tuple[Segment, ...]:
    heads = {"q": HEADS, "k": kv_heads, "v": kv_heads}
    return tuple(Segment(name, n * HEAD, units=n) for name, n in heads.items())


@dataclass(frozen=True)
class Topology:
    """Ranks are numbered with tp fastest, then ep, dp, pp."""

    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    chunks: int = 1
    """Model chunks of a stage (virtual pipeline)."""

    @property
    def world_size(self) -> int:
        return self.tp * self.ep * self.dp * self.pp

    def place(self, rank: int) -> MeshPlace:
        sizes = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "tp": self.tp}
        return MeshPlace.numbered(sizes, rank)

    def stage(self, rank: int) -> int:
        return rank // (self.tp * self.ep * self.dp)

    def names(self, rank: int) -> Iterator[str]:
        """Parameters that a rank holds: stages take turns, chunk by chunk."""
        stage = self.stage(rank)
        if stage == 0:
            yield "embed.weight"
        run = LAYERS // (self.pp * self.chunks)
        for layer in range(LAYERS):
            if layer // run % self.pp == stage:
                yield from (f"layers.{layer}.{name}" for name in SHAPES)
        if stage == self.pp - 1:
            yield "head.weight"


def declarations(place: MeshPlace, **more: Any) -> Declarations:
    layouts = {
        "*column.*": Split({"tp": 0}),
        "*row.weight*": Split({"tp": 1}),
        "*mha.weight*": Split({"tp": 0}, _packed(HEADS)),
        "*gqa.weight*": Split({"tp": 0}, _packed(KV_HEADS)),
        "*gate_up*": Split({"ep": 0, "tp": 1}, (Segment("gate", 8), Segment("up", 8))),
        "*norm*": Split({}),
        "*embed.weight*": Split({"tp": 0}, padding=Padding(VOCABULARY)),
        "*head.weight*": Split({"tp": 0}, padding=Padding(VOCABULARY)),
    }
    ties = {"model.head.weight": "model.embed.weight"}
    return Declarations(mesh=place, layouts={**layouts, **more}, ties=ties)


def padded(tp: int) -> int:
    """Rows of the embedding as Megatron pads them."""
    return -(-VOCABULARY // (128 * tp)) * 128 * tp


def whole(name: str, slot: str = "") -> torch.Tensor:
    """A tensor of the model on one rank, without padding; the tied ends are one."""
    if name in ("embed.weight", "head.weight"):
        name, shape = "embed.weight", (VOCABULARY, WIDTH)
    else:
        shape = SHAPES[name.split(".", 2)[2]]
    seed = sum(map(ord, name)) * 7 + len(slot)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def piece(name: str, tensor: torch.Tensor, place: MeshPlace, rows: int = 0) -> torch.Tensor:
    """This rank's part of a whole tensor.

    Args:
        name: Of the parameter.
        tensor: The whole.
        place: This rank's.
        rows: Of the padded embedding, instead of those that the mesh gives.
    """
    tp, at = place.split("tp").count, place.split("tp").coordinate
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if kind in ("embed", "head"):
        rows = rows or padded(tp)
        filler = torch.zeros(rows - len(tensor), *tensor.shape[1:])
        return torch.cat([tensor, filler]).chunk(tp)[at]
    if kind == "norm":
        return tensor
    if kind == "row":
        return tensor.chunk(tp, 1)[at]
    if kind == "gate_up":
        ep = place.split("ep")
        own = tensor.chunk(ep.count)[ep.coordinate]
        return torch.cat([half.chunk(tp, 1)[at] for half in own.chunk(2, 1)], 1)
    if kind in ("mha", "gqa"):
        kv = HEADS if kind == "mha" else KV_HEADS
        q, k, v = tensor.split([HEADS * HEAD, kv * HEAD, kv * HEAD])
        shared = min(kv, tp)
        own_kv = at * shared // tp
        return torch.cat([q.chunk(tp)[at], k.chunk(shared)[own_kv], v.chunk(shared)[own_kv]])
    return tensor.chunk(tp, 0)[at]


def state_of(topology: Topology, rank: int, *, is_filled: bool) -> dict[str, Any]:
    """What a rank holds, as a trainer without modules would hand it in: moments beside weights."""
    place = topology.place(rank)
    model: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for name in topology.names(rank):
        for slot in SLOTS:
            tensor = piece(name, whole(name, slot), place).clone()
            if not is_filled:
                tensor.fill_(-1.0)
            if slot:
                moments[f"{name}{slot}"] = tensor
            else:
                model[name] = tensor
        moments[f"{name}.step"] = torch.tensor(7.0 if is_filled else 0.0)
    if topology.pp == 1:  # one parameter with two names has one set of moments
        model["head.weight"] = model["embed.weight"]
        for slot in (*SLOTS[1:], ".step"):
            del moments[f"head.weight{slot}"]
    return {"model": model, "optim": {"state": moments}}
