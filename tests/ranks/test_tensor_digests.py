"""Resume onto another topology: digests of the state, in the store and in memory, are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_resume import (
    CheckpointManager,
    Declarations,
    LoadOptions,
    MeshPlace,
    Prove,
    SaveMode,
    Settings,
    Split,
    TensorDigests,
    Writer,
    digest_tensors,
)
from dcp_resume.errors import IncompletePlan, ReplicaMismatch, TensorMismatch
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box
from dcp_resume.session.incarnation import forget_incarnations
from tests.ranks import test_declared_flat as flat
from tests.ranks.test_agreement import error_of
from tests.support.forgery import FORGED_STEP, flip_element, opened_at
from tests.support.megatron import Topology, declarations, state_of
from tests.support.models import LAYOUTS, differences, whole_state

pytestmark = pytest.mark.ranks

PROVED = LoadOptions(prove=Prove.TENSORS)
SOURCES = ("fsdp2_tp2", "pp2_tp2", "single")
TARGETS = ("single", "tp2", "fsdp4", "hsdp2_2_tp2")
FORGED = "model.layers.1.down.weight"


def manager(root: str, **options: Any) -> CheckpointManager:
    options = {"mode": SaveMode.BLOCKING, "load": PROVED, **options}
    recording = TensorDigests.RECORD
    return CheckpointManager(root, Settings(deadline_s=60, tensor_digests=recording, **options))


def brute(tensor: torch.Tensor) -> str:
    shape = tuple(tensor.shape)
    return PositionDigest.of(as_bytes(tensor), tensor.element_size(), Box.whole(shape), shape).hex


def recorded(root: Path) -> dict[str, str]:
    """FQN → its digest in the newest catalog, of those that have one."""
    tensors = opened_at(root).catalog.tensors
    return {e.fqn: e.tensor_digest.value for e in tensors if e.tensor_digest is not None}


# DTensors of FSDP2, HSDP and TP, pipeline stages, and the moments of an optimizer.


def save_on(name: str, root: str, mode: SaveMode) -> dict[str, str]:
    trainee = LAYOUTS[name].build()
    with manager(root, mode=mode) as checkpoints:
        checkpoints.save(FORGED_STEP, trainee.state)
        before = digest_tensors(trainee.state)
        trainee.step()  # staged or written by now: must not reach the checkpoint
    return before


def load_on(name: str, roots: dict[str, str], forged: str) -> dict[str, Any]:
    """Load every source, proved; then one whose documents are right and an element is not."""
    trainee = LAYOUTS[name].build("another", num_steps=0)
    found: dict[str, Any] = {"different": [], "digests": []}
    for root in roots.values():
        with manager(root) as checkpoints:
            checkpoints.load(trainee.state)
        found["different"] += differences(trainee, whole_state())
        found["digests"].append(digest_tensors(trainee.state))
    with manager(forged) as checkpoints:
        found["forged"] = error_of(lambda: checkpoints.load(trainee.state))
        found["blocks"] = checkpoints.load(trainee.state, options=LoadOptions()).step
    return found


@pytest.fixture(scope="module")
def roots(ranks, tmp_path_factory) -> dict[str, str]:
    """Source → root; each rank of each source had the digests of the whole before it went on."""
    expected = {fqn: brute(tensor) for fqn, tensor in whole_state().items()}
    found = {name: str(tmp_path_factory.mktemp(name) / "run") for name in SOURCES}
    for mode, (name, root) in zip([*SaveMode, *SaveMode], found.items(), strict=False):
        before = ranks.run(save_on, LAYOUTS[name].world_size, name, root, mode)
        assert before == [expected] * len(before)
    return found


def test_every_mesh_records_the_digests_of_the_whole_tensors(roots):
    expected = {fqn: brute(tensor) for fqn, tensor in whole_state().items()}
    for root in roots.values():
        assert recorded(Path(root)) == expected


@pytest.mark.parametrize("target", TARGETS)
def test_state_digests_are_equal_after_a_resume_onto_another_topology(
    ranks, roots, tmp_path, target
):
    """And one wrong element, under block digests that are right, is named on every rank."""
    expected = {fqn: brute(tensor) for fqn, tensor in whole_state().items()}
    forged = tmp_path / "forged"
    ranks.run(save_on, 4, "fsdp2_tp2", str(forged), SaveMode.BLOCKING)
    flip_element(forged, FORGED)

    for found in ranks.run(load_on, LAYOUTS[target].world_size, target, roots, str(forged)):
        assert found["different"] == []
        assert found["digests"] == [expected] * len(roots)
        error = found["forged"]
        assert isinstance(error, TensorMismatch)
        assert [(p.where, p.kind) for p in error.problems] == [(FORGED, "tensor_digest")]
        assert error.expected == {FORGED: expected[FORGED]}
        assert error.found.keys() == {FORGED}
        assert error.found != error.expected
        assert found["blocks"] == FORGED_STEP


# Declared layouts: packed QKV, padded vocabulary, experts, ties across pipeline stages.


def save_declared(root: str, topology: Topology) -> None:
    declared = declarations(topology.place(dist.get_rank()))
    with manager(root, declarations=declared) as checkpoints:
        checkpoints.save(7, state_of(topology, dist.get_rank(), is_filled=True))


def resume_declared(root: str, topology: Topology) -> dict[str, str]:
    declared = declarations(topology.place(dist.get_rank()))
    state = state_of(topology, dist.get_rank(), is_filled=False)
    with manager(root, declarations=declared) as checkpoints:
        checkpoints.resume(state)
    return digest_tensors(state, declarations=declared)


def test_declared_layouts_padding_and_ties_give_the_same_digests_on_every_topology(ranks, tmp_path):
    source = Topology(tp=2, dp=2, pp=2, chunks=2)
    ranks.run(save_declared, source.world_size, str(tmp_path), source)
    stored = recorded(tmp_path)
    for topology in (Topology(), Topology(tp=4), Topology(pp=2)):
        found = ranks.run(resume_declared, topology.world_size, str(tmp_path), topology)
        assert found == [found[0]] * topology.world_size
        assert {fqn: found[0][fqn] for fqn in stored} == stored
        assert found[0]["model.head.weight"] == found[0]["model.embed.weight"]
        tied = {fqn for fqn in found[0] if fqn not in stored}
        assert {fqn for fqn in tied if "head.weight" not in fqn} == set()


def flat_on(root: str, dp: int, tp: int, is_saving: bool) -> dict[str, str]:
    place = flat.place_of(dp, tp)
    zero = {slot: flat.buffer_of(slot, place) for slot in flat.SLOTS}
    declared = flat.declarations_at(place)
    with manager(root, declarations=declared) as checkpoints:
        if is_saving:
            checkpoints.save(3, {"zero": zero})
        else:
            zero = {slot: torch.zeros_like(buffer) for slot, buffer in zero.items()}
            checkpoints.load({"zero": zero})
    return digest_tensors({"zero": zero}, declarations=declared)


def test_flat_buffers_give_the_digests_of_their_members(ranks, tmp_path):
    expected = {
        f"optim.state.{name}.{slot}": brute(flat.whole(name, slot))
        for name in flat.SHAPES
        for slot in flat.SLOTS
    }
    for dp, tp, is_saving in ((2, 2, True), (3, 1, False), (1, 2, False)):
        found = ranks.run(flat_on, dp * tp, str(tmp_path), dp, tp, is_saving)
        assert found == [expected] * (dp * tp)
    assert recorded(tmp_path) == expected


# What ranks hold in copies, alone, or not at all.


def digest_odd_states() -> list[Any]:
    rank = dist.get_rank()
    own = {"a": {"w": torch.full((2,), float(rank)), "n": rank}}
    found: list[Any] = [error_of(lambda: digest_tensors(own))]
    found.append(digest_tensors(own, declarations=Declarations(per_rank=("a.*",))))
    found.append(digest_tensors(own, declarations=Declarations(from_rank={"a.w": 1})))
    place = MeshPlace.numbered({"tp": 2}, rank)
    split = Declarations(mesh=place, layouts={"a.w": Split({"tp": 0})})
    half = {"a": {"w": torch.full((2,), float(rank))} if rank == 0 else {}}
    found.append(error_of(lambda: digest_tensors(half, declarations=split)))
    found.append(digest_tensors(own, declarations=split))
    return found


def test_a_live_state_that_has_no_digest_says_why(ranks):
    both = ranks.run(digest_odd_states, 2)
    for torn, alone, chosen, half, split in both:
        assert isinstance(torn, ReplicaMismatch)
        assert [(p.where, p.kind) for p in torn.problems] == [("a.w", "replica")]
        assert "ranks [0] and ranks [1] hold different values" in torn.problems[0].message
        assert alone == {}
        assert chosen == {"a.w": brute(torch.ones(2))}
        assert isinstance(half, IncompletePlan)
        assert [(p.where, p.kind) for p in half.problems] == [("a.w", "hole")]
        assert split == {"a.w": brute(torch.tensor([0.0, 0.0, 1.0, 1.0]))}


# The door of plain DCP.


def save_through_dcp(root: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    state = {"w": distribute_tensor(torch.arange(20.0).reshape(5, 4), mesh, [Shard(1)])}
    writer = Writer(root, step=1, tensor_digests=TensorDigests.RECORD)
    dcp.save({"m": state, "n": {"x": torch.ones(3)}}, storage_writer=writer)
    forget_incarnations()


def test_plain_dcp_with_its_own_planner_records_them_too(ranks, tmp_path):
    ranks.run(save_through_dcp, 2, str(tmp_path))
    whole = {"m.w": torch.arange(20.0).reshape(5, 4), "n.x": torch.ones(3)}
    assert recorded(tmp_path) == {fqn: brute(tensor) for fqn, tensor in whole.items()}
