"""A remembered outline: reused while nothing changes, and found wrong by any change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from dcp_resume.errors import DuplicateFqn, UnsupportedLeaf
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.declared import Flat, Member, Segment, Split
from dcp_resume.planning.mesh_place import MeshPlace
from dcp_resume.planning.outline import OutlineMemory
from dcp_resume.planning.state import describe_state

PLACE = MeshPlace(("tp",), (2,), (1,))
FLAT = Flat((Member("w", (4, 3)), Member("b", (3,))), ("tp",), "optim.{}.exp_avg")


def plain():
    return {"model": {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}, "n": 1}


def summary(described):
    """All that a description says, with the bytes that it would save."""
    return (
        [
            (t.entry, [(p.box, p.memory.data_ptr(), p.memory.tolist()) for p in t.pieces])
            for t in described.tensors
        ],
        described.meshes,
        described.values,
        described.per_rank_values,
        [described.ties.names(t.entry.fqn) for t in described.tensors],
    )


def entries(described):
    return [held.entry for held in described.tensors]


def is_reused(memory, before, after, declarations=None):
    declarations = declarations or Declarations()
    first = describe_state(before, declarations, memory)
    second = describe_state(after, declarations, memory)
    assert summary(second) == summary(describe_state(after, declarations))
    return all(a is b for a, b in zip(entries(first), entries(second), strict=False))


def test_other_memory_and_other_values_are_no_change():
    memory, before, after = OutlineMemory(), plain(), plain()
    after["model"]["w"] += 1
    after["n"] = [2, "three"]

    assert is_reused(memory, before, after)


def flat_state(scale=1.0):
    return {
        "model": {"w": torch.ones(2, 3), "b": torch.full((3,), scale)},
        "optim": {"flat": torch.arange(8.0) * scale},
    }


@pytest.mark.parametrize(
    "layouts",
    [
        {"model.w": Split({"tp": 0}), "optim.flat": FLAT},
        {"model.w": Split({"tp": 1}), "optim.flat": FLAT},
        {"model.w": Split({"tp": 0}, (Segment("q", 2), Segment("k", 2)))},
    ],
)
def test_declared_leaves_are_reused_too(layouts):
    declarations = Declarations(mesh=PLACE, layouts=layouts)

    assert is_reused(OutlineMemory(), flat_state(), flat_state(2.0), declarations)


def with_leaf(**leaves):
    state = plain()
    state["model"].update(leaves)
    return state


CHANGED = {
    "shape": with_leaf(w=torch.ones(3, 4)),
    "dims": with_leaf(b=torch.ones(3, 1)),
    "dtype": with_leaf(b=torch.ones(3, dtype=torch.float64)),
    "added": with_leaf(c=torch.ones(1)),
    "removed": {"model": {"w": torch.ones(4, 3)}, "n": 1},
    "renamed": {"model": {"w": torch.ones(4, 3), "c": torch.ones(3)}, "n": 1},
    "order": {"n": 1, **{key: value for key, value in plain().items() if key != "n"}},
    "path": {"model.w": torch.ones(4, 3), "model.b": torch.ones(3), "n": 1},
    "key_kind": {"model": {"w": torch.ones(4, 3), "b": torch.ones(3)}, "n": 1, "l": {0: 1}},
    "value_for_tensor": with_leaf(b=3),
    "tensor_for_value": {**plain(), "n": torch.ones(1)},
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_change_is_noticed(change):
    assert not is_reused(OutlineMemory(), plain(), CHANGED[change])


def test_a_position_and_a_key_of_one_name_are_told_apart():
    memory, none = OutlineMemory(), Declarations()
    describe_state({"a": {"0": torch.ones(1)}}, none, memory)

    (held,) = describe_state({"a": [torch.ones(1)]}, none, memory).tensors

    assert held.entry.path == ("a", 0)


def test_names_that_begin_or_cease_to_share_memory():
    memory, none = OutlineMemory(), Declarations()
    apart, tied = plain(), plain()
    apart["model"]["w2"] = torch.ones(4, 3)
    tied["model"]["w2"] = tied["model"]["w"]
    described = [describe_state(state, none, memory) for state in (apart, tied, tied, apart)]

    found = [{e.fqn: e.alias_of for e in entries(d)}["model.w2"] for d in described]
    assert found == [None, "model.w", "model.w", None]
    assert [d.ties.is_tied("model.w2") for d in described] == [False, True, True, False]
    assert all(a is b for a, b in zip(entries(described[1]), entries(described[2]), strict=True))


def test_each_declaration_counts_even_if_changed_in_place():
    dims, layouts, ties, from_rank = {"tp": 0}, {}, {}, {}
    declarations = Declarations(mesh=PLACE, layouts=layouts, ties=ties, from_rank=from_rank)
    memory = OutlineMemory()

    def check():
        told = Declarations(
            mesh=PLACE, layouts=dict(layouts), ties=dict(ties), from_rank=dict(from_rank)
        )
        found = summary(describe_state(plain(), declarations, memory))
        fresh = summary(describe_state(plain(), told))
        assert [entry for entry, _ in found[0]] == [entry for entry, _ in fresh[0]]
        assert found[1:] == fresh[1:]
        return found[0][0][0]

    assert check().kind == "replicated"
    layouts["model.w"] = Split(dims)
    assert check().global_shape == (8, 3)
    dims.clear()
    dims["tp"] = 1
    assert check().global_shape == (4, 6)
    layouts["model.*"] = Split({})
    assert check().global_shape == (4, 6)
    moved = layouts.pop("model.w")
    layouts["model.w"] = moved  # behind the pattern that matches it too
    assert check().global_shape == (4, 3)
    ties["model.w"] = "model.first"
    assert check().alias_of == "model.first"
    text = declarations.to_text()
    from_rank["n"] = 1
    assert declarations.to_text() != text


def test_per_rank_names_move_between_the_values():
    memory = OutlineMemory()
    shared = describe_state(plain(), Declarations(), memory)
    own = describe_state(plain(), Declarations(per_rank=("n", "model.b")), memory)

    assert (set(shared.values), set(shared.per_rank_values)) == ({"n"}, set())
    assert (set(own.values), set(own.per_rank_values)) == (set(), {"n"})
    assert [entry.kind for entry in entries(own)] == ["replicated", "per_rank"]


BAD = {
    "sparse": lambda: torch.ones(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.ones(3, device="meta"),
    "subclass": lambda: torch.ones(3).as_subclass(type("Sub", (torch.Tensor,), {})),
    "value": object,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", BAD)
def test_a_leaf_that_cannot_be_stored_is_found_each_time(kind):
    memory, none = OutlineMemory(), Declarations()
    describe_state(with_leaf(b=torch.ones(3)), none, memory)

    for _ in range(2):
        with pytest.raises(UnsupportedLeaf) as caught:
            describe_state(with_leaf(b=BAD[kind]()), none, memory)
        assert [problem.where for problem in caught.value.problems] == ["model.b"]
    assert is_reused(memory, plain(), plain())


def test_a_value_of_a_known_leaf_that_cannot_be_stored_any_more():
    memory, none = OutlineMemory(), Declarations()
    describe_state(plain(), none, memory)

    with pytest.raises(UnsupportedLeaf) as caught:
        describe_state({**plain(), "n": {"a", object()}}, none, memory)

    assert [problem.where for problem in caught.value.problems] == ["n"]


def test_a_name_twice_after_a_good_state():
    memory = OutlineMemory()
    describe_state(plain(), Declarations(), memory)

    with pytest.raises(DuplicateFqn):
        describe_state({**plain(), "model.w": 1}, Declarations(), memory)


def test_it_keeps_no_tensor_alive():
    memory, state = OutlineMemory(), plain()
    state["model"]["p"] = nn.Parameter(torch.ones(2))
    described = describe_state(state, Declarations(), memory)

    tensors = [weakref.ref(held.pieces[0].memory) for held in described.tensors]
    leaves = [weakref.ref(tensor) for tensor in state["model"].values()]
    del state, described
    gc.collect()

    assert [ref() for ref in (*tensors, *leaves)] == [None] * 6
