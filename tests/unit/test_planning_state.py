"""A state dict as leaves: names, paths, views, aliases, and what cannot be saved."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch

from dcp_resume.errors import DuplicateFqn, UnsupportedLeaf
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.flattening import flatten, fqn_of, part_of
from dcp_resume.planning.held import HeldTensor
from dcp_resume.planning.placements import HeldBox
from dcp_resume.planning.state import describe_state

NONE = Declarations()


def names(state):
    return [fqn_of(path) for path, _ in flatten(state)]


def test_names_are_dcp_names():
    state = {
        "model": OrderedDict(a=torch.ones(1), b={"c": torch.ones(1)}),
        "list": [1, [2, torch.ones(1)]],
        "plain": [1, 2],
        "pair": (torch.ones(1), 3),
        "empty": {},
        5: {6: 7},
    }

    assert names(state) == [
        "model.a",
        "model.b.c",
        "list.0",
        "list.1.0",
        "list.1.1",
        "plain",
        "pair.0",
        "pair.1",
        "empty",
        "5.6",
    ]


def test_paths_tell_keys_from_positions():
    paths = [path for path, _ in flatten({"a": {0: 1}, "b": [torch.ones(1)], "c": {"0": 1}})]

    assert paths == [("a", {"key": 0}), ("b", 0), ("c", "0")]
    assert [part_of(path) for path in paths] == ["a", "b", "c"]
    assert part_of(("w",)) == "state"


@pytest.mark.parametrize(
    "state", [{"a.b": 1, "a": {"b": 2}}, {"a": {0: 1, "0": 2}}, {"a": [torch.ones(1)], "a.0": 1}]
)
def test_two_leaves_of_one_name(state):
    with pytest.raises(DuplicateFqn):
        describe_state(state, NONE)


def test_all_unsupported_leaves_are_listed():
    state = {
        "a": object(),
        "b": {"c": lambda: 0},
        "d": torch.ones(2).to_sparse(),
        "e": torch.empty(2, device="meta"),
        "fine": 1,
    }

    with pytest.raises(UnsupportedLeaf) as caught:
        describe_state(state, NONE)

    assert {problem.where for problem in caught.value.problems} == {"a", "b.c", "d", "e"}


@pytest.mark.parametrize("key", [1.5, None, (1, 2)])
def test_keys_that_are_no_names(key):
    with pytest.raises(UnsupportedLeaf):
        describe_state({"a": {key: 1}}, NONE)


def test_aliases_are_the_same_memory_in_the_same_shape():
    base = torch.arange(6.0)
    state = {
        "a": base,
        "same": base,
        "view": base.view(2, 3),
        "part": base[:3],
        "detached": base.detach(),
        "copy": base.clone(),
        "empty": base[:0],
        "empty_too": base[:0],
    }

    found = {t.entry.fqn: t.entry.alias_of for t in describe_state(state, NONE).tensors}

    assert {fqn: alias for fqn, alias in found.items() if alias} == {"same": "a", "detached": "a"}


def test_declarations():
    declarations = Declarations(per_rank=("data.*",), from_rank={"model.bn*": 2, "*": 1})
    state = {"data": {"rng": torch.ones(2), "n": 1}, "model": {"bn1": torch.ones(1)}, "n": 3}

    described = describe_state(state, declarations)

    assert {t.entry.fqn: t.entry.kind for t in described.tensors} == {
        "data.rng": "per_rank",
        "model.bn1": "replicated",
    }
    assert set(described.per_rank_values) == {"data.n"}
    assert set(described.values) == {"n"}
    assert declarations.source_rank("model.bn1") == 2
    assert declarations.source_rank("other") == 1
    assert Declarations().source_rank("other") is None


def test_views_of_held_boxes():
    local = torch.arange(12.0).reshape(4, 3)
    entry = describe_state({"w": torch.zeros(10, 3)}, NONE).tensors[0].entry
    held = HeldTensor.of(
        entry,
        local,
        (
            HeldBox(Box((0, 0), (2, 3)), (0, 0)),
            HeldBox(Box((5, 0), (2, 3)), (2, 0)),
        ),
    )

    assert held.view(Box((1, 1), (1, 2))).tolist() == [[4.0, 5.0]]
    assert held.view(Box((5, 0), (2, 1))).tolist() == [[6.0], [9.0]]
    with pytest.raises(LookupError):
        held.view(Box((1, 0), (5, 3)))


def test_layers_are_read_off_names():
    state = {"model": {f"{stem}.3.w": torch.ones(1) for stem in ("layers", "h", "blocks", "other")}}

    layers = {t.entry.fqn: t.entry.layer for t in describe_state(state, NONE).tensors}

    assert layers == {
        "model.layers.3.w": 3,
        "model.h.3.w": 3,
        "model.blocks.3.w": 3,
        "model.other.3.w": None,
    }
