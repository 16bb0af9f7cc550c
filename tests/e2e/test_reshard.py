"""Resharding offline: what is committed loads bit-equal, and each rank's bytes lie in one run."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import defaultdict
from itertools import pairwise

import pytest
import torch

from dcp_resume.errors import ConfigurationError, CorruptData, LoadRefused
from dcp_resume.manager.checkpoint_manager import CheckpointManager
from dcp_resume.planning.layout_rules import LayoutRules, TargetMesh
from dcp_resume.planning.overlaps import Wanted, find_overlaps
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.opening import open_checkpoint
from dcp_resume.session.reshard import ReshardOptions, reshard
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.verify import verify_checkpoint
from dcp_resume.storage import open_store
from tests.support.simulated import SimulatedMesh, boxes_of, save_simulated

MESHES = ["tp=2", "dp_shard=4", "dp_shard=2,tp=2", "tp=2,pp=2,dp=1", "pp=3,dp_shard=3", "pp=2"]

LAYOUT = {
    "rules": [
        {"match": "model.*.wq", "tp": 0, "dp_shard": 0},
        {"match": "model.*.wo", "tp": 1, "dp_shard": 0},
        {"match": "model.embed", "dp_shard": 0},
        {"match": "model.*", "dp_shard": 0},
    ],
    "replicate": ["dp"],
}
MATRIX, COLUMN, ROW = {"dp_shard": 0}, {"dp_shard": 0, "tp": 0}, {"dp_shard": 0, "tp": 1}


def make_state():
    generator = torch.Generator().manual_seed(1)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    state = {"model.embed": random(17, 6)}
    for layer in range(5):
        state[f"model.layers.{layer}.wq"] = random(10, 6, dtype=torch.bfloat16)
        state[f"model.layers.{layer}.wo"] = random(6, 10)
        state[f"model.layers.{layer}.norm"] = random(6)
    state["model.head"] = random(17, 6)
    for name in [name for name in state if name.startswith("model.")]:
        state[f"optim.state.{name[6:]}.exp_avg"] = torch.randn_like(state[name].float())
    state["optim.state.embed.step"] = torch.tensor(3.0)
    state["trainer.counter"] = torch.arange(5)
    return state


def rule_of(name):
    if name.endswith("step") or name.startswith("trainer"):
        return {}
    words = name.split(".")
    return COLUMN if "wq" in words else ROW if "wo" in words else MATRIX


def save_whole(url, state):
    with CheckpointManager(url) as checkpoints:
        checkpoints.save(12, {**nested(state), "note": {"text": "kept"}}).result()


def nested(state):
    parts = defaultdict(dict)
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return dict(parts)


def save_sharded(url, state, **more):
    mesh = SimulatedMesh({"dp_shard": 2, "tp": 2})
    rules = {name: rule_of(name) for name in state}
    return save_simulated(url, 12, state, rules, mesh, values={"note.text": "kept"}, **more)


def run_reshard(source_url, target_url, to, **options):
    source, target = open_store(str(source_url)), open_store(str(target_url))
    (located,) = find_checkpoints(source, "latest")
    return reshard(source, located, target, TargetMesh.parse(to), ReshardOptions(**options))


def opened_at(url):
    store = open_store(str(url))
    (located,) = find_checkpoints(store, "latest")
    return open_checkpoint(store, located.prefix, located.manifest)


def check_equal(url, state):
    """Load on one rank, and compare bit by bit."""
    wanted = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    target = {**nested(wanted), "note": {"text": ""}}
    with CheckpointManager(url) as checkpoints:
        result = checkpoints.load(target)
    assert result.values["note.text"] == "kept"
    for name, tensor in state.items():
        assert wanted[name].dtype == tensor.dtype
        assert torch.equal(wanted[name], tensor), name


def runs_of(opened, rank):
    """Per part and file the byte runs that a rank reads, and whether it alone holds them."""
    meshes = {mesh.id: mesh for mesh in opened.manifest.topology.meshes}
    world = range(opened.manifest.topology.world_size)
    spans = defaultdict(list)
    for position, entry in enumerate(opened.catalog.tensors):
        if entry.mesh is None:
            continue
        mesh = meshes[entry.mesh]
        boxes = boxes_of(entry.global_shape, entry.placements, mesh, rank)
        others = [boxes_of(entry.global_shape, entry.placements, mesh, r) for r in world]
        is_own = others.count(boxes) == 1
        for held in boxes:
            (overlap,) = find_overlaps([Wanted(0, position, held.box)], opened.index)
            assert overlap.in_chunk.offsets == (0,) * len(held.box.offsets)
            assert overlap.box == held.box
            assert opened.index.chunk_sizes[overlap.chunk].prod() == held.box.volume
            begin = int(opened.begins[overlap.chunk])
            length = held.box.volume * int(opened.itemsizes[position])
            file = int(opened.index.chunk_file[overlap.chunk])
            spans[entry.part, file, is_own].append((begin, begin + length))
    runs = {}
    for key, found in spans.items():
        found.sort()
        runs[key] = 1 + sum(a[1] != b[0] for a, b in pairwise(found))
    return runs


def check_contiguous(url):
    opened = opened_at(url)
    for rank in range(opened.manifest.topology.world_size):
        own_files = defaultdict(set)
        for (part, file, is_own), count in runs_of(opened, rank).items():
            if is_own:
                own_files[part].add(file)
                assert count == 1, (rank, part)
                assert opened.catalog.files[file].rank == rank
        assert all(len(files) == 1 for files in own_files.values())
        assert own_files
    return opened


@pytest.mark.parametrize("to", MESHES)
def test_from_one_rank(tmp_path, to):
    state = make_state()
    save_whole(tmp_path / "a", state)
    result = run_reshard(
        tmp_path / "a", tmp_path / "b", to, rules=LayoutRules.from_document(LAYOUT)
    )
    assert {kept.fqn for kept in result.kept} <= {"trainer.counter"}
    check_equal(tmp_path / "b", state)
    opened = check_contiguous(tmp_path / "b")
    assert str(opened.manifest.topology.world_size) == str(TargetMesh.parse(to).world_size)
    store = open_store(str(tmp_path / "b"))
    assert verify_checkpoint(store, find_checkpoints(store, "latest")[0]).problems == ()


@pytest.mark.parametrize("to", MESHES)
def test_from_many_ranks(tmp_path, to):
    state = make_state()
    save_sharded(str(tmp_path / "a"), state)
    run_reshard(tmp_path / "a", tmp_path / "b", to)
    check_equal(tmp_path / "b", state)
    check_contiguous(tmp_path / "b")
    # And back, although the first target lacked some of the axes.
    run_reshard(tmp_path / "b", tmp_path / "c", "dp_shard=2,tp=2")
    check_equal(tmp_path / "c", state)
    entries = {entry.fqn: entry for entry in opened_at(tmp_path / "c").catalog.tensors}
    assert entries["model.layers.0.wq"].placements == ("SS(0,2)", "S(0)")
    assert entries["optim.state.layers.0.wo.exp_avg"].placements == ("S(0)", "S(1)")


def test_stock_reader_loads_the_result(tmp_path):
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    state = make_state()
    save_sharded(str(tmp_path / "a"), state)
    result = run_reshard(tmp_path / "a", tmp_path / "b", "dp_shard=3,tp=2")
    wanted = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    load(wanted, storage_reader=HuggingFaceStorageReader(str(tmp_path / "b" / result.prefix)))
    assert all(torch.equal(wanted[name], tensor) for name, tensor in state.items())


def test_52_a_checkpoint_becomes_one_safetensors_file_a_part_and_these_a_checkpoint(tmp_path):
    from safetensors.torch import load_file

    state = make_state()
    save_sharded(str(tmp_path / "a"), state)
    result = run_reshard(tmp_path / "a", tmp_path / "b", "dp=1")
    files = list((tmp_path / "b" / result.prefix).glob("*.safetensors"))
    assert len(files) == len({name.split(".")[0] for name in state})
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    save_whole(tmp_path / "c", found)
    check_equal(tmp_path / "c", state)


def test_windows_smaller_than_chunks(tmp_path):
    state = {
        "model.layers.0.wq": torch.arange(3 * 700 * 1000, dtype=torch.int32).view(3, 700, 1000)
    }
    save_simulated(
        str(tmp_path / "a"), 1, state, {}, SimulatedMesh({"dp": 1}), values={"note.text": "kept"}
    )
    layout = {"rules": [{"match": "*", "tp": 2}]}
    result = run_reshard(
        tmp_path / "a",
        tmp_path / "b",
        "tp=2",
        rules=LayoutRules.from_document(layout),
        window_bytes=1 << 20,
    )
    assert result.num_files == 2
    check_equal(tmp_path / "b", state)
    check_contiguous(tmp_path / "b")


def test_pipeline_stages(tmp_path):
    state = make_state()
    save_sharded(str(tmp_path / "a"), state)
    run_reshard(tmp_path / "a", tmp_path / "b", "pp=2,tp=2")
    opened = opened_at(tmp_path / "b")
    assert opened.manifest.topology.stages == ((0, 1, 2), (3, 4))
    entries = {entry.fqn: entry for entry in opened.catalog.tensors}
    first, last = entries["model.layers.0.wq"].mesh, entries["model.layers.4.wq"].mesh
    assert first != last
    assert entries["model.embed"].mesh == entries["trainer.counter"].mesh == first
    assert entries["optim.state.embed.exp_avg"].mesh == first
    assert entries["model.head"].mesh == entries["optim.state.head.exp_avg"].mesh == last


def test_values_of_ranks(tmp_path):
    state = make_state()
    save_sharded(str(tmp_path / "a"), state, per_rank={"rng.seed": [1, 2, 3, 4]})
    kept = run_reshard(tmp_path / "a", tmp_path / "same", "tp=4")
    assert kept.dropped == ()
    opened = opened_at(tmp_path / "same")
    position = opened.tensor_ids["~per-rank.rng"]
    files = opened.index.chunk_file[opened.index.chunks_of(position)]
    assert sorted(opened.catalog.files[f].rank for f in files) == [0, 1, 2, 3]
    dropped = run_reshard(tmp_path / "a", tmp_path / "other", "tp=2")
    assert dropped.dropped == ("~per-rank.rng",)
    check_equal(tmp_path / "other", state)
    with pytest.raises(LoadRefused) as caught:
        run_reshard(tmp_path / "a", tmp_path / "strict", "tp=2", is_strict=True)
    assert [p.where for p in caught.value.problems] == ["~per-rank.rng"]
    assert not (tmp_path / "strict").exists()


def test_strict_lists_every_tensor_without_a_rule(tmp_path):
    save_whole(tmp_path / "a", make_state())
    with pytest.raises(LoadRefused) as caught:
        run_reshard(tmp_path / "a", tmp_path / "b", "tp=2", is_strict=True)
    names = {problem.where for problem in caught.value.problems}
    assert "model.layers.0.wq" in names
    assert "optim.state.embed.step" not in names  # a scalar has no dim to split
    assert not (tmp_path / "b").exists()


def test_aliases_stay_aliases(tmp_path):
    shared = torch.randn(8, 4)
    with CheckpointManager(tmp_path / "a") as checkpoints:
        state = {"model": {"embed": shared, "head": shared}}
        checkpoints.save(1, state).result()
    layout = LayoutRules.from_document({"rules": [{"match": "model.*", "tp": 0}]})
    run_reshard(tmp_path / "a", tmp_path / "b", "tp=2", rules=layout)
    entries = {entry.fqn: entry for entry in opened_at(tmp_path / "b").catalog.tensors}
    assert (entries["model.head"].kind, entries["model.head"].alias_of) == ("alias", "model.embed")
    found = {"model": {"head": torch.zeros(8, 4), "embed": torch.zeros(8, 4)}}
    with CheckpointManager(tmp_path / "b") as checkpoints:
        checkpoints.load(found)
    assert torch.equal(found["model"]["head"], shared)


def test_within_one_run_the_result_descends_from_its_source(tmp_path):
    state = make_state()
    save_sharded(str(tmp_path), state)
    result = run_reshard(tmp_path, tmp_path, "tp=2")
    history = RunLog(open_store(str(tmp_path))).refresh()
    assert [entry.record.generation for entry in history.lineage()] == [2, 1]
    assert history.newest().seq == result.seq
    check_equal(tmp_path, state)


def test_damaged_source_commits_nothing_and_leaves_nothing(tmp_path):
    save_sharded(str(tmp_path / "a"), make_state())
    victim = sorted((tmp_path / "a").glob("step-*/*/*optim*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CorruptData) as caught:
        run_reshard(tmp_path / "a", tmp_path / "b", "tp=2")
    assert victim.name in caught.value.problems[0].where
    assert list(open_store(str(tmp_path / "b")).list("")) == []


@pytest.mark.parametrize("to", ["tp", "tp=0", "tp=2,tp=2", "TP=2", "", "tp=1000,dp=1000"])
def test_malformed_meshes(to):
    with pytest.raises(ConfigurationError):
        TargetMesh.parse(to)


def test_too_many_stages(tmp_path):
    save_sharded(str(tmp_path / "a"), make_state())
    with pytest.raises(ConfigurationError, match="5 layer"):
        run_reshard(tmp_path / "a", tmp_path / "b", "pp=6")


@pytest.fixture(scope="module")
def bucket(s3_server):
    s3_server.make_bucket("reshard")
    return "s3://reshard"


@pytest.mark.s3
@pytest.mark.parametrize("to", MESHES)
def test_local_to_s3_and_back(tmp_path, s3_server, bucket, to):
    state = make_state()
    save_sharded(str(tmp_path / "a"), state)
    url = f"{bucket}/{to.replace('=', '').replace(',', '-').replace('_', '-')}"
    remote = open_store(url, storage_options=s3_server.storage_options)
    source, back = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    mesh = TargetMesh.parse(to)
    reshard(source, find_checkpoints(source, "latest")[0], remote, mesh, ReshardOptions())
    reshard(remote, find_checkpoints(remote, "latest")[0], back, mesh, ReshardOptions())
    check_equal(tmp_path / "b", state)
    check_contiguous(tmp_path / "b")


MEASURE = """
    import json, re, sys
    from pathlib import Path
    from dcp_resume.planning.layout_rules import LayoutRules, TargetMesh
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.reshard import ReshardOptions, reshard
    from dcp_resume.storage import open_store

    def peak():
        found = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024

    source, target = open_store(sys.argv[1]), open_store(sys.argv[2])
    located = find_checkpoints(source, "latest")[0]
    rules = LayoutRules.from_document({"rules": [{"match": "*", "tp": 1}]})
    Path("/proc/self/clear_refs").write_text("5")  # the mark was inherited from the parent
    before = peak()
    result = reshard(
        source, located, target, TargetMesh.parse("tp=2"), ReshardOptions(rules=rules)
    )
    print(json.dumps({"before": before, "after": peak(), "num_bytes": result.num_bytes}))
"""


def test_memory_is_bounded_by_the_window(tmp_path):
    """300 MiB, in chunks of 100 MiB: the window (64 MiB) and four readers, not a rank's state."""
    state = {f"model.layers.{n}.w": torch.zeros(5, 1024, 5120) for n in range(3)}
    mesh = SimulatedMesh({"dp": 1})
    save_simulated(str(tmp_path / "a"), 1, state, {}, mesh)
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), tmp_path / "a", tmp_path / "b"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    print(f"\nreshard of {found['num_bytes'] >> 20} MiB: peak {found}")
    assert found["num_bytes"] > 300 << 20
    assert found["after"] - found["before"] < 160
