"""Ties: which names are one, and what a rank that has both ends as two tensors saves and loads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcp_resume import (
    CheckpointManager,
    Declarations,
    Flat,
    Member,
    MeshPlace,
    SaveMode,
    Settings,
    Split,
)
from dcp_resume.errors import ReplicaMismatch
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.parameters import ParameterNames
from dcp_resume.planning.plans import decode_structure
from dcp_resume.planning.state import describe_state
from dcp_resume.planning.ties import Ties

TIES = {"model.head.weight": "model.embed.weight"}


def manager(root, **declared):
    declarations = Declarations(**{"ties": TIES, **declared})
    return CheckpointManager(root, Settings(mode=SaveMode.BLOCKING, declarations=declarations))


def test_names_of_parameters_and_of_what_belongs_to_them():
    ties = Ties({**TIES, "model.out.weight": "model.head.weight"})
    whole = ("model.embed.weight", "model.head.weight", "model.out.weight")
    assert ties.names("model.head.weight") == whole
    assert ties.names("model.embed.weight") == whole
    assert ties.names("optim.state.out.weight.exp_avg") == (
        "optim.state.embed.weight.exp_avg",
        "optim.state.head.weight.exp_avg",
        "optim.state.out.weight.exp_avg",
    )
    assert ties.canonical("ema.head.weight") == "ema.embed.weight"
    for other in ("model.head.bias", "optim.state.head.bias.m", "model.x.head.weight", "step"):
        assert ties.names(other) == (other,)
        assert not ties.is_tied(other)
    assert Ties().names("model.head.weight") == ("model.head.weight",)


def test_a_longer_parameter_is_not_taken_for_a_tied_one():
    leaf = "optim.state.decoder.head.weight.exp_avg"
    assert Ties(TIES).is_tied(leaf)
    assert not Ties(TIES, ["model.decoder.head.weight"]).is_tied(leaf)


def test_the_owner_of_a_leaf_has_the_longest_name():
    names = ParameterNames(["model.weight", "model.a.weight", "optim.state.a.weight.m", "model"])
    assert names.owner("optim.state.a.weight.m").fqn == "model.a.weight"
    assert names.owner("optim.state.b.weight.m").fqn == "model.weight"
    assert names.owner("model.a.weight") is None
    assert names.owner("optim.step") is None


def test_the_name_that_is_tied_to_no_other_comes_first_whatever_the_order():
    weight = torch.ones(2)
    state = {"model": {"head.weight": weight, "embed.weight": weight}}
    found = {
        ties: {
            held.entry.fqn: held.entry.alias_of
            for held in describe_state(state, Declarations(ties=dict(ties))).tensors
        }
        for ties in ((), tuple(TIES.items()))
    }
    assert found[()] == {"model.head.weight": None, "model.embed.weight": "model.head.weight"}
    assert found[tuple(TIES.items())] == {
        "model.head.weight": "model.embed.weight",
        "model.embed.weight": None,
    }


def ends(change=0.0):
    """Two model chunks on one rank, each with an end of its own."""
    weight = torch.arange(8.0).reshape(4, 2)
    other = weight.clone()
    other[3, 1] += change
    return {"model": {"embed.weight": weight, "head.weight": other}}


def test_two_ends_on_one_rank_are_stored_once_and_loaded_both(tmp_path):
    with manager(tmp_path) as checkpoints:
        checkpoints.save(1, ends())
        into = {"model": {name: torch.zeros(4, 2) for name in ends()["model"]}}
        assert checkpoints.load(into).report.items == ()
    for name, tensor in ends()["model"].items():
        assert torch.equal(into["model"][name], tensor)
    (file,) = tmp_path.glob("step-*/*/*.safetensors")
    assert b"head.weight" not in file.read_bytes()


def test_a_further_name_that_no_tie_names_is_no_difference(tmp_path):
    weight = torch.ones(4, 2)
    names = ("embed.weight", "head.weight", "shared.weight")
    with manager(tmp_path) as checkpoints:
        checkpoints.save(1, {"model": dict.fromkeys(names, weight)})
        checkpoints.load({"model": dict.fromkeys(names, weight)})


def test_two_ends_on_one_rank_that_differ_are_refused(tmp_path):
    with manager(tmp_path) as checkpoints, pytest.raises(ReplicaMismatch, match=r"head\.weight"):
        checkpoints.save(1, ends(1e-6))


def test_ends_that_are_split_otherwise_are_refused_by_both_names():
    weight = torch.arange(8.0).reshape(4, 2)
    layouts = {"*embed*": Split({"tp": 0}), "*head*": Split({"tp": 1})}
    plans = []
    for rank in range(4):
        place = MeshPlace.numbered({"pp": 2, "tp": 2}, rank)
        own = {"embed.weight": weight.chunk(2, 0)[rank % 2]} if rank < 2 else {}
        own |= {"head.weight": weight.chunk(2, 1)[rank % 2]} if rank > 1 else {}
        declared = Declarations(mesh=place, layouts=layouts, ties=TIES)
        plans.append(local_plan(describe_state({"model": own}, declared), rank, 4, declared))
    with pytest.raises(ReplicaMismatch) as caught:
        merge(plans)
    (problem,) = caught.value.problems
    assert problem.where == "model.head.weight"
    assert "cut otherwise than model.embed.weight" in problem.message


def test_the_other_stage_may_write_what_is_stored_under_the_first_name():
    tied = [{"model": {name: torch.ones(4, 2)}} for name in ("embed.weight", "head.weight")]
    loads = [{"model": {f"layers.{n}": torch.ones(1024 * (2 - n))}} for n in range(2)]
    declared = Declarations(ties=TIES)
    plans = []
    for rank in range(2):
        state = {"model": {**tied[rank]["model"], **loads[rank]["model"]}}
        plans.append(local_plan(describe_state(state, declared), rank, 2, declared))
    merged = merge(plans)
    names = [entry.fqn for entry in merged.tensors]
    rows = merged.layout.chunks.tensor == names.index("model.embed.weight")
    assert merged.layout.chunks.rank[rows].tolist() == [1]  # it has less to write
    part = merged.rank_plan(1)
    own = [entry.fqn for entry in decode_structure(plans[1].shape.structure)[0]]
    assert "model.embed.weight" not in own
    assert "model.embed.weight" in [key for _, key, _, _ in part.rows(own)]
    assert -1 not in part.tensor.tolist()


def flat_of(*names):
    return Flat(tuple(Member(n, (4, 2)) for n in names), ("dp",), "optim.state.{}.m")


def test_flat_buffers_of_two_stages_keep_both_names_and_load_into_one(tmp_path):
    place = MeshPlace.numbered({"dp": 1}, 0)
    both = {"zero.m": flat_of("embed.weight", "head.weight")}
    with manager(tmp_path, mesh=place, layouts=both) as checkpoints:
        checkpoints.save(1, {"zero": {"m": torch.arange(16.0) % 8}})
    for name in ("embed.weight", "head.weight"):
        buffer = torch.zeros(8)
        with manager(tmp_path, mesh=place, layouts={"zero.m": flat_of(name)}) as checkpoints:
            assert checkpoints.load({"zero": {"m": buffer}}).report.items == ()
        assert buffer.tolist() == torch.arange(8.0).tolist()


class Tied(nn.Module):
    def __init__(self, first):
        super().__init__()
        for name in ("embed", "head") if first == "embed" else ("head", "embed"):
            self.add_module(name, nn.Linear(2, 4, bias=False))
        self.head.weight = self.embed.weight


def test_a_tie_of_memory_alone_reads_moments_under_either_name(tmp_path):
    """No declaration: the parameter's first name is the head's here, the embedding's there."""
    model = Tied("embed")
    optimizer = torch.optim.AdamW(model.parameters())
    model.embed.weight.sum().backward()
    optimizer.step()
    with manager(tmp_path, ties={}) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": optimizer})
    other = Tied("head")
    fresh = torch.optim.AdamW(other.parameters())
    with manager(tmp_path) as checkpoints:
        checkpoints.load({"model": other, "optim": fresh})
    assert torch.equal(other.head.weight, model.embed.weight)
    moments = fresh.state[other.head.weight]
    assert torch.equal(moments["exp_avg"], optimizer.state[model.embed.weight]["exp_avg"])


def test_an_empty_member_of_a_flat_buffer(tmp_path):
    place = MeshPlace.numbered({"dp": 1}, 0)
    flat = Flat((Member("a", (0, 3)), Member("b", (2,))), ("dp",), "optim.{}.m")
    buffer = torch.tensor([1.0, 2.0])
    with manager(tmp_path, mesh=place, layouts={"zero.m": flat}) as checkpoints:
        checkpoints.save(1, {"zero": {"m": buffer}})
        into = torch.zeros(2)
        checkpoints.load({"zero": {"m": into}})
    assert into.tolist() == [1.0, 2.0]
