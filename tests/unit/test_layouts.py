"""Layouts for another mesh: rules, stages, placements and files, without any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_resume.errors import ConfigurationError
from dcp_resume.format.digests import block_bounds, digest_blocks
from dcp_resume.format.streamed_digests import StreamedDigests
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import MeshEntry, TensorEntry
from dcp_resume.planning.layout_rules import LayoutRules, TargetMesh
from dcp_resume.planning.layouts import Kept, StoredState, plan_layout
from dcp_resume.planning.pieces import cut_box

SOURCE_MESH = MeshEntry(id="m", axes=("dp_shard", "tp"), shape=(2, 2))


def tensor(fqn, shape=(8, 8), rule=None, **fields):
    part, _, rest = fqn.partition(".")
    values = {"kind": "sharded" if rule else "replicated", "dtype": "float32", **fields}
    if rule is not None:
        values |= {"mesh": "m", "placements": ("R", "R"), "rule": rule}
    return TensorEntry(fqn=fqn, path=(part, rest), part=part, global_shape=shape, **values)


def plan(tensors, to, layout=None, world_size=4, per_rank=None):
    source = StoredState(world_size, tuple(tensors), {"m": SOURCE_MESH}, {}, {}, per_rank or {})
    rules = LayoutRules.from_document(layout or {})
    return plan_layout(source, TargetMesh.parse(to), rules)


def placements(layout):
    return {entry.fqn: entry.placements for entry in layout.plan.tensors}


def test_pp_becomes_the_outermost_axis():
    mesh = TargetMesh.parse("tp=2,pp=3,dp=4")
    assert str(mesh) == "pp=3,tp=2,dp=4"
    assert (mesh.world_size, mesh.num_stages, mesh.ranks_a_stage) == (24, 3, 8)
    assert [entry.ranks and entry.ranks[0] for entry in mesh.stage_meshes()] == [None, 8, 16]


def test_data_axes_split_what_model_axes_left():
    weight = tensor("model.w", rule={"dp_shard": 0, "tp": 0})
    assert placements(plan([weight], "dp_shard=2,tp=4"))["model.w"] == ("SS(0,4)", "S(0)")
    assert placements(plan([weight], "tp=4,dp_shard=2"))["model.w"] == ("S(0)", "S(0)")
    chunks = plan([weight], "dp_shard=2,tp=4").plan.layout.chunks
    # Rank = 4 * dp + tp; rows 2 * tp … are cut again by dp.
    assert sorted(zip(chunks.rank.tolist(), chunks.offsets[:, 0].tolist(), strict=True)) == [
        (4 * dp + tp, 2 * tp + dp) for dp in range(2) for tp in range(4)
    ]


def test_axes_are_renamed():
    weight = tensor("model.w", rule={"dp_shard": 1})
    found = plan([weight], "dp=2", {"axes": {"dp_shard": "dp"}})
    assert placements(found)["model.w"] == ("S(1)",)
    assert found.kept == ()
    found = plan([weight], "dp=2")
    assert placements(found)["model.w"] == ("R",)
    assert found.kept == (Kept("model.w", ("dp",)),)


def test_the_first_rule_that_matches_counts_and_replaces():
    weight = tensor("model.w", rule={"tp": 0})
    rules = [{"match": "model.w", "dp_shard": 1}, {"match": "*", "tp": 1}]
    assert placements(plan([weight], "dp_shard=2,tp=2", {"rules": rules}))["model.w"] == (
        "S(1)",
        "R",
    )
    assert placements(plan([weight], "tp=2", {"rules": [{"match": "*"}]}))["model.w"] == ("R",)


def test_optimizer_state_follows_its_parameter():
    tensors = [
        tensor("model.a.weight", rule={"tp": 1}),
        tensor("model.weight", rule={"tp": 0}),
        tensor("optim.state.a.weight.exp_avg"),
        tensor("optim.state.weight.exp_avg"),
        tensor("optim.state.a.weight.step", ()),
        tensor("optim.state.a.weight.row_sums", (8,)),
    ]
    found = plan(tensors, "tp=2")
    assert placements(found) == {
        "model.a.weight": ("S(1)",),
        "model.weight": ("S(0)",),
        "optim.state.a.weight.exp_avg": ("S(1)",),
        "optim.state.weight.exp_avg": ("S(0)",),
        "optim.state.a.weight.step": ("R",),
        "optim.state.a.weight.row_sums": ("R",),
    }
    assert found.kept == (Kept("optim.state.a.weight.row_sums", ("tp",)),)
    override = {"rules": [{"match": "model.a.weight", "tp": 0}]}
    assert placements(plan(tensors, "tp=2", override))["optim.state.a.weight.exp_avg"] == ("S(0)",)


def test_a_replicated_dtensor_is_no_leftover():
    norm = tensor("model.norm", (8,), rule={})
    assert plan([norm], "tp=2").kept == ()
    assert plan([norm], "ep=2").kept == (Kept("model.norm", ("ep",)),)
    assert plan([norm], "ep=2", {"replicate": ["ep"]}).kept == ()
    assert plan([norm], "dp_replicate=2,cp=2").kept == ()


def test_rules_that_do_not_fit_are_all_listed():
    tensors = [tensor("model.a", (8,)), tensor("model.b", (8,)), tensor("model.step", ())]
    with pytest.raises(ConfigurationError, match="2 rule") as caught:
        plan(tensors, "tp=2", {"rules": [{"match": "*", "tp": 1}]})
    assert "model.a" in str(caught.value)
    assert "model.step" not in str(caught.value)


def model_of(num_layers):
    layers = [tensor(f"model.layers.{n}.w", layer=n, rule={"tp": 0}) for n in range(num_layers)]
    return [tensor("model.embed"), *layers, tensor("model.norm"), tensor("data.x")]


def stages_of(found, to):
    ids = [mesh.id for mesh in TargetMesh.parse(to).stage_meshes()]
    return [ids.index(entry.mesh) for entry in found.plan.tensors]


def test_stages():
    found = plan(model_of(5), "pp=2,tp=2")
    assert found.stages == ((0, 1, 2), (3, 4))
    assert stages_of(found, "pp=2,tp=2") == [0, 0, 0, 0, 1, 1, 1, 0]
    layout = {"stages": [[0], [1, 2, 3, 4]], "rules": [{"match": "data.*", "stage": 1}]}
    found = plan(model_of(5), "pp=2,tp=2", layout)
    assert stages_of(found, "pp=2,tp=2") == [0, 0, 1, 1, 1, 1, 1, 1]
    assert found.plan.layout.chunks.rank.min() == 0
    assert plan(model_of(5), "pp=1,tp=2").stages is None


@pytest.mark.parametrize(
    "layout",
    [
        {"stages": [[0, 1]]},
        {"stages": [[0], [0, 1]]},
        {"stages": [[0], [2]]},
        {"rules": [{"match": "*", "stage": 2}]},
    ],
)
def test_stages_that_do_not_fit(layout):
    with pytest.raises(ConfigurationError):
        plan(model_of(2), "pp=2", layout)


def test_files_of_own_and_of_shared_chunks():
    tensors = [
        tensor("model.norm", (8,), rule={}),
        tensor("model.w", rule={"tp": 0}),
        tensor("model.v", rule={"tp": 0, "dp_shard": 1}, dtype="bfloat16"),
        tensor("model.u", rule={"tp": 1, "dp_shard": 0}),
        tensor("model.odd", rule={"tp": 0, "dp_shard": 1}, dtype="complex128"),
        tensor("optim.m", rule={"dp_shard": 0}),
    ]
    layout = plan(tensors, "dp_shard=2,tp=2").plan.layout
    files = {name: [] for name in layout.names}
    for row, file in enumerate(layout.file.tolist()):
        files[layout.names[file]].append(layout.key_of(row))
    assert files == {
        "shard-00001-model-00001-of-00003.safetensors": ["model.u", "model.v"],
        "shard-00001-model-00002-of-00003.safetensors": ["model.w"],
        "shard-00001-model-00003-of-00003.safetensors": ["model.norm"],
        "shard-00001-model-00001-of-00001.safetensors.part": ["model.odd#0"],
        "shard-00001-optim-00001-of-00001.safetensors": ["optim.m"],
        "shard-00002-model-00001-of-00002.safetensors": ["model.u", "model.v"],
        "shard-00002-model-00002-of-00002.safetensors": ["model.w"],
        "shard-00002-model-00001-of-00001.safetensors.part": ["model.odd#0"],
        "shard-00003-model-00001-of-00001.safetensors": ["model.u", "model.v"],
        "shard-00003-model-00001-of-00001.safetensors.part": ["model.odd#0"],
        "shard-00003-optim-00001-of-00001.safetensors": ["optim.m"],
        "shard-00004-model-00001-of-00001.safetensors": ["model.u", "model.v"],
        "shard-00004-model-00001-of-00001.safetensors.part": ["model.odd#0"],
    }


def test_per_rank_tensors_go_to_their_rank_or_are_dropped():
    rng = tensor("rng.state", (4, 2), kind="per_rank")
    where = {"rng.state": [(rank, Box((rank, 0), (1, 2))) for rank in range(4)]}
    layout = plan([rng], "tp=4", per_rank=where).plan.layout
    assert layout.ranks.tolist() == [0, 1, 2, 3]
    found = plan([rng, tensor("model.w", rule={})], "tp=2", per_rank=where)
    assert found.dropped == ("rng.state",)
    assert [entry.fqn for entry in found.plan.tensors] == ["model.w"]


def test_empty_tensors_and_nothing_at_all():
    found = plan([tensor("model.none", (0, 4), rule={"tp": 0})], "tp=2")
    assert found.plan.layout.chunks.sizes.tolist() == [[0, 4]]
    assert plan([], "tp=2").plan.layout.names == ()


def test_more_ranks_than_rows():
    found = plan([tensor("model.w", (3, 1), rule={"tp": 0})], "tp=5")
    assert found.plan.layout.chunks.rank.tolist() == [0, 1, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=4), st.integers(1, 60))
def test_pieces_are_the_box_in_order(dims, max_elements):
    box = Box(tuple(offset for offset, _ in dims), tuple(size for _, size in dims))
    whole = np.arange(10 ** len(dims)).reshape((10,) * len(dims))

    def cells(part):
        return whole[tuple(map(slice, part.offsets, part.stops))].ravel()

    pieces = list(cut_box(box, max_elements))
    assert all(piece.volume <= max_elements for piece in pieces)
    assert np.array_equal(np.concatenate([cells(piece) for piece in pieces]), cells(box))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 200_000), max_size=6), st.lists(st.integers(900, 150_000), min_size=1)
)
def test_streamed_digests_are_those_of_the_whole_file(lengths, windows):
    bounds = block_bounds(64, np.asarray(lengths, np.int64), 2**16)
    data = np.random.default_rng(0).bytes(int(bounds[-1]))
    digests, position, turn = StreamedDigests(bounds), 0, 0
    while position < len(data):
        stop = position + windows[turn % len(windows)]
        digests.update(memoryview(data)[position:stop])
        position, turn = stop, turn + 1
    assert digests.finish() == digest_blocks(bounds, [data])


def test_streamed_digests_want_the_whole_file_and_no_more():
    digests = StreamedDigests(np.asarray([0, 3], np.int64))
    digests.update(memoryview(b"ab"))
    with pytest.raises(ValueError, match="ends at 3"):
        digests.finish()
    with pytest.raises(ValueError, match="beyond"):
        digests.update(memoryview(b"cd"))


def test_padding_stays_and_flat_ranges_become_whole():
    embed = tensor("model.embed", (12, 4), {"tp": 0}, padding={"dim": 0, "logical_size": 10})
    moment = tensor("optim.embed.m", (12, 4), {"tp": 0}, kind="dp_sharded")
    found = plan([embed, moment], "tp=4").plan
    assert [(e.kind, e.placements) for e in found.tensors] == [("sharded", ("S(0)",))] * 2
    assert found.tensors[0].padding.logical_size == 10
    assert found.tensors[0].global_shape == (12, 4)
    assert found.layout.chunks.sizes[:, 0].tolist() == [3] * 8


def test_packed_tensors_are_refused_by_name():
    packed = tensor("model.qkv", (12, 4), {"tp": 0}, segments=({"name": "q", "size": 12},))
    with pytest.raises(ConfigurationError, match=r"packed in segments.*model\.qkv"):
        plan([packed], "tp=2")
