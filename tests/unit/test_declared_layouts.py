"""Declared layouts: which leaf gets which, what is refused, and what a declaration proves."""

from __future__ import annotations

import pytest
import torch

from dcp_resume import Declarations, Flat, Member, MeshPlace, Padding, Segment, Split
from dcp_resume.errors import (
    ConfigurationError,
    DuplicateFqn,
    IncompletePlan,
    ReplicaMismatch,
    StateError,
)
from dcp_resume.planning.declarations import Parameter
from dcp_resume.planning.local_plans import CORNER_ELEMENTS, local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.state import describe_state

ROWS = Split({"tp": 0})


def place_of(rank, **mesh):
    return MeshPlace.numbered(mesh or {"tp": 2}, rank)


def held_of(state, layouts, place, **more):
    declared = Declarations(mesh=place, layouts=layouts, **more)
    return {held.entry.fqn: held for held in describe_state(state, declared).tensors}


def merged(states, layouts, mesh, **more):
    plans = []
    for rank, state in enumerate(states):
        declared = Declarations(mesh=place_of(rank, **mesh), layouts=layouts, **more)
        plans.append(local_plan(describe_state(state, declared), rank, len(states), declared))
    return merge(plans)


# Meshes.


@pytest.mark.parametrize(
    "fields",
    [
        {"axes": ("a",)},
        {"axes": ("a", "a"), "shape": (1, 1), "coordinate": (0, 0)},
        {"axes": ("a",), "shape": (2,), "coordinate": (2,)},
        {"axes": ("pp",), "shape": (2,), "coordinate": (0,)},
    ],
)
def test_a_mesh_that_cannot_be(fields):
    with pytest.raises(ConfigurationError):
        MeshPlace(**fields)


@pytest.mark.parametrize(
    ("sizes", "rank"), [({"tp": 2}, 2), ({"tp": 2}, -1), ({"tp": 2, "pp": 2}, 0)]
)
def test_a_rank_without_a_place(sizes, rank):
    with pytest.raises(ConfigurationError):
        MeshPlace.numbered(sizes, rank)


def test_a_mesh_of_another_rank_is_refused_where_a_layout_uses_it():
    declared = Declarations(mesh=place_of(1), layouts={"*": ROWS})
    state = describe_state({"m": {"w": torch.ones(2)}}, declared)
    assert local_plan(state, 1, 2, declared).shape.rank == 1
    with pytest.raises(ConfigurationError, match="seen from rank 1; this is rank 0 of 2"):
        local_plan(state, 0, 2, declared)
    with pytest.raises(ConfigurationError, match="ranks 0 to 1"):
        local_plan(state, 1, 1, declared)
    unused = Declarations(mesh=place_of(1))
    local_plan(describe_state({"m": {"w": torch.ones(2)}}, unused), 0, 2, unused)


# Words.


@pytest.mark.parametrize(
    "make",
    [
        lambda: Split({}, (Segment("q", 4),)),
        lambda: Split({"tp": -1}),
        lambda: Split({"tp": 0}, (Segment("q", 4),), Padding(3)),
        lambda: Segment("q", 4, units=3),
        lambda: Segment("q", 0),
        lambda: Padding(-1),
        lambda: Flat((), (), "optim.{}.m"),
        lambda: Flat((), ("dp",), "optim.m"),
        lambda: Flat((Member("a", (1,)), Member("a", (2,))), ("dp",), "optim.{}.m"),
        lambda: Declarations(ties={"m.a": "m.b", "m.b": "m.a"}),
        lambda: Declarations(ties={"m.a": "m.a"}),
    ],
)
def test_words_that_say_nothing(make):
    with pytest.raises(ConfigurationError):
        make()


def test_units_that_ranks_cannot_share():
    layout = Split({"tp": 0}, (Segment("q", 6, units=3), Segment("k", 6, units=2)))
    with pytest.raises(ConfigurationError, match="segment 'k' of 6 rows in 2 units"):
        held_of({"m": {"w": torch.ones(5)}}, {"*": layout}, place_of(0, tp=3))


def test_an_unknown_axis_is_named():
    with pytest.raises(ConfigurationError, match="names the mesh axis 'cp'"):
        held_of({"m": {"w": torch.ones(5)}}, {"*": Split({"cp": 0})}, place_of(0))


# Which leaf gets which.


def test_moments_follow_their_parameter_in_its_shape_alone():
    state = {
        "model": {"up.weight": torch.ones(2, 3), "norm": torch.ones(3)},
        "optim": {
            "state.up.weight.exp_avg": torch.ones(2, 3),
            "state.up.weight.row": torch.ones(2),
            "state.up.weight.column": torch.ones(3),
            "state.up.weight.step": torch.tensor(1.0),
        },
    }
    layouts = {"model.up.weight": ROWS, "*.row": Split({"tp": 0}), "*column": Split({})}

    held = held_of(state, layouts, place_of(1))

    assert {fqn: (h.entry.global_shape, h.entry.rule) for fqn, h in held.items()} == {
        "model.up.weight": ((4, 3), {"tp": 0}),
        "model.norm": ((3,), {}),
        "optim.state.up.weight.exp_avg": ((4, 3), {"tp": 0}),
        "optim.state.up.weight.row": ((4,), {"tp": 0}),
        "optim.state.up.weight.column": ((3,), {}),
        "optim.state.up.weight.step": ((), {}),
    }
    assert held["optim.state.up.weight.column"].is_declared
    assert not held["model.norm"].is_declared
    wide = held_of(state, {"*up.weight*": ROWS}, place_of(1))
    assert wide["optim.state.up.weight.exp_avg"].entry.global_shape == (4, 3)
    assert wide["optim.state.up.weight.row"].entry.global_shape == (2,)


def test_the_first_pattern_counts_that_fits():
    declared = Declarations(layouts={"*.bias": Split({"tp": 1}), "*": ROWS})
    assert declared.layout_of("m.bias", (4,)) == ROWS
    assert declared.layout_of("m.bias", (4, 4)) == Split({"tp": 1})
    assert declared.layout_of("m.step", ()) is None
    parameter = Parameter("m.w", (4, 4))
    assert declared.layout_of("o.w.m", (4, 4), parameter) == ROWS
    assert declared.layout_of("o.w.m", (4,), parameter) is None
    assert Declarations(layouts={"*": Split({})}).layout_of("m.step", ()) == Split({})


def test_a_per_rank_leaf_has_no_layout():
    held = held_of({"m": {"w": torch.ones(2)}}, {"*": ROWS}, place_of(0), per_rank=("m.w",))
    assert held["m.w"].entry.kind == "per_rank"


# What is refused.


def test_a_local_tensor_that_is_not_what_its_layout_gives():
    packed = Split({"tp": 0}, (Segment("q", 8), Segment("k", 4)))
    with pytest.raises(StateError, match=r"m\.w: .* gives this rank 6 elements .* has 8"):
        held_of({"m": {"w": torch.ones(8)}}, {"*": packed}, place_of(0))
    padded = Split({"tp": 0}, padding=Padding(50257))
    with pytest.raises(StateError, match="has 50256 rows, the layout declares 50257 before"):
        held_of({"m": {"w": torch.ones(25128)}}, {"*": padded}, place_of(0))


def test_ranks_whose_shards_differ_in_shape_are_named():
    states = [{"m": {"w": torch.ones(3 - rank)}} for rank in range(2)]
    with pytest.raises(IncompletePlan, match=r"rank 1 says \(4,\), a rank before it \(6,\)"):
        merged(states, {"*": ROWS}, {"tp": 2})


def test_a_flat_buffer_that_is_none():
    flat = Flat((Member("w", (3, 4)),), ("tp",), "optim.{}.m")
    for buffer in (torch.ones(2, 3), torch.ones(5)):
        with pytest.raises(StateError, match="at least 6 elements"):
            held_of({"z": {"b": buffer}}, {"z.b": flat}, place_of(0))
    state = {"z": {"b": torch.ones(6)}, "optim": {"w": {"m": torch.ones(1)}}}
    with pytest.raises(DuplicateFqn, match=r"optim\.w\.m"):
        held_of(state, {"z.b": flat}, place_of(0))
    with pytest.raises(StateError, match="declared as one itself"):
        held_of({"z": {"b": torch.ones(6)}}, {"*": flat}, place_of(0))


# What a declaration proves.


def test_a_declared_replica_is_proved_but_for_a_corner():
    whole = torch.arange(float(2 * CORNER_ELEMENTS)).reshape(2, -1)
    other = whole.clone()
    other[1, 5] += 1
    layouts, mesh = {"*": Split({})}, {"dp": 2}
    plan = merged([{"m": {"w": whole}}, {"m": {"w": other}}], layouts, mesh)
    assert len(plan.layout.chunks.tensor) == 1  # believed: nobody looked
    with pytest.raises(ReplicaMismatch):
        merged([{"m": {"w": whole}}, {"m": {"w": other}}], {}, mesh)


def test_experts_that_every_rank_counts_from_0_are_found_by_a_corner():
    states = [{"m": {"experts.0.w": torch.full((64, 64), float(rank // 2))}} for rank in range(4)]
    with pytest.raises(ReplicaMismatch, match=r"m\.experts\.0\.w"):
        merged(states, {"*": ROWS}, {"ep": 2, "tp": 2})


def test_layers_of_two_stages_are_compared_whole():
    weights = [torch.zeros(64, 512) for _ in range(2)]
    weights[1][63, 511] = 1.0
    states = [{"m": {"layers.0.w": weights[rank // 2]}} for rank in range(4)]
    with pytest.raises(ReplicaMismatch, match=r"m\.layers\.0\.w"):
        merged(states, {"*": ROWS}, {"pp": 2, "tp": 2})


def test_one_structure_is_sent_by_all_ranks_of_a_flat_buffer():
    """The coordinator reads it once, however many ranks there are."""
    flat = Flat((Member("a", (5,)), Member("b", (2, 3))), ("dp",), "optim.{}.m")
    structures = set()
    for rank in range(4):
        declared = Declarations(mesh=place_of(rank, dp=4), layouts={"z.b": flat})
        state = describe_state({"z": {"b": torch.ones(3)}}, declared)
        structures.add(local_plan(state, rank, 4, declared).shape.structure)
    assert len(structures) == 1


def test_a_flat_buffer_is_loaded_in_place():
    flat = Flat((Member("a", (2, 2)), Member("b", (3,))), ("dp",), "optim.{}.m")
    buffer = torch.zeros(4)
    held = held_of({"z": {"b": buffer}}, {"z.b": flat}, place_of(1, dp=2))
    assert held["optim.a.m"].pieces == ()
    (piece,) = held["optim.b.m"].pieces
    piece.memory.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert buffer.tolist() == [1.0, 2.0, 3.0, 0.0]
    assert held["optim.b.m"].entry.kind == "dp_sharded"
    assert held["optim.b.m"].entry.path == ("optim", "b.m")
