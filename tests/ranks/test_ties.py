"""Weights tied across pipeline stages: stored once, tied again after a load, with their moments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_resume import (
    CheckpointManager,
    Declarations,
    LoadOptions,
    SaveMode,
    Settings,
    Severity,
)
from dcp_resume.errors import LoadRefused, ReplicaMismatch
from tests.ranks.test_agreement import error_of

pytestmark = pytest.mark.ranks

TIES = {"model.head.weight": "model.embed.weight"}
SHAPES = {"embed": (11, 4), "layers.0": (4, 4), "layers.1": (4, 4), "head": (11, 4)}
TIED_SLOTS = ("weight", "exp_avg", "exp_avg_sq", "step")


class Stage(nn.Module):
    """The modules of one pipeline stage; where it is the only one, both ends are one parameter."""

    def __init__(self, stage: int, num_stages: int, first: str = "embed") -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        own = {0: ["embed", "layers.0"], 1: ["layers.1", "head"]}
        names = own[stage] if num_stages == 2 else [first, "layers.0", "layers.1"]
        names += [] if num_stages == 2 else [{"embed": "head", "head": "embed"}[first]]
        for name in names:
            rows, columns = SHAPES[name]
            module = nn.Linear(columns, rows, bias=False)
            holder, _, key = name.rpartition(".")
            if holder:
                self.layers[key] = module
            else:
                self.add_module(name, module)
        if num_stages == 1:
            self.head.weight = self.embed.weight


def kind_of(name: str) -> str:
    """Both ends get the same numbers, as their gradients are added up in training."""
    return name.replace("head", "embed")


def numbers(name: str, number: int) -> torch.Tensor:
    seed = sum(map(ord, kind_of(name))) + 1000 * number
    shape = SHAPES[name.removesuffix(".weight")]
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Job:
    def __init__(self, num_stages: int, first: str = "embed") -> None:
        self.model = Stage(dist.get_rank() if num_stages > 1 else 0, num_stages, first)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optimizer}

    def begin(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(numbers(name, 0))

    def train(self, *steps: int) -> None:
        for step in steps:
            for name, parameter in self.model.named_parameters():
                parameter.grad = numbers(name, step)
            self.optimizer.step()

    def found(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            found[name] = parameter.tolist()
            for slot, tensor in self.optimizer.state[parameter].items():
                found[f"{name}.{slot}"] = tensor.tolist()
        return found

    @property
    def is_tied(self) -> bool:
        return self.model.head.weight is self.model.embed.weight


def manager(root: str, ties: Any = TIES, **options: Any) -> CheckpointManager:
    declared = Declarations(ties=ties)
    settings = Settings(mode=SaveMode.BLOCKING, deadline_s=60, declarations=declared, **options)
    return CheckpointManager(root, settings)


def run_job(
    root: str, num_stages: int, *steps: int, ties: Any = TIES, first: str = "embed"
) -> dict[str, list[Any]]:
    """Resume or begin, train, save; returns every number of this rank."""
    job = Job(num_stages, first)
    with manager(root, ties) as checkpoints:
        resumed = checkpoints.resume(job.state)
        if resumed is None:
            job.begin()
        else:
            assert [i for i in resumed.report.items if i.severity > Severity.OK] == []
        job.train(*steps)
        checkpoints.save(steps[-1], job.state)
    assert num_stages == 2 or job.is_tied
    return job.found()


def train_with(num_stages: int, *steps: int) -> dict[str, list[Any]]:
    job = Job(num_stages)
    job.begin()
    job.train(*steps)
    return job.found()


def newest_catalog(root: Path) -> dict[str, Any]:
    path = max(root.glob("step-*/*/catalog.json"))
    return {entry["fqn"]: entry for entry in json.loads(path.read_bytes())["tensors"]}


@pytest.mark.parametrize("first", ["embed", "head"])
def test_28_ties_hold_from_two_stages_to_one_and_back_with_moments(ranks, tmp_path, first):
    """INFINITRAIN 28: the same numbers as a run that was never interrupted, on either side."""
    (expected,) = ranks.run(train_with, 1, 1, 1, 2, 3, 4, 5)
    root = str(tmp_path)

    ranks.run(run_job, 2, root, 2, 1, 2)

    entries = newest_catalog(tmp_path)
    for slot in TIED_SLOTS:
        name = "model.{}.weight" if slot == "weight" else f"optim.state.{{}}.weight.{slot}"
        entry = entries[name.format("head")]
        assert (entry["kind"], entry["alias_of"]) == ("alias", name.format("embed"))

    ranks.run(ranks_one, 1, root, first)
    stages = ranks.run(run_job, 2, root, 2, 5)

    both = {**stages[0], **stages[1]}
    assert both == expected
    assert sorted(both) == sorted(expected)


def ranks_one(root: str, first: str) -> None:
    """The middle of the run on one rank, whose module order may call the parameter otherwise."""
    run_job(root, 1, 3, 4, first=first)


def begin_apart(root: str, slot: str) -> Any:
    """Two stages whose ends have drifted apart."""
    job = Job(2)
    job.begin()
    job.train(1)
    if dist.get_rank() == 1:
        parameter = job.model.head.weight
        tensor = parameter if slot == "weight" else job.optimizer.state[parameter][slot]
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
    with manager(root) as checkpoints:
        return error_of(lambda: checkpoints.save(1, job.state))


@pytest.mark.parametrize("slot", ["weight", "exp_avg_sq"])
def test_ends_that_differ_are_refused_by_both_names(ranks, tmp_path, slot):
    name = "model.{}.weight" if slot == "weight" else f"optim.state.{{}}.weight.{slot}"
    for error in ranks.run(begin_apart, 2, str(tmp_path), slot):
        assert isinstance(error, ReplicaMismatch)
        assert [(p.where, p.kind) for p in error.problems] == [(name.format("head"), "tied")]
        assert f"differs from {name.format('embed')}" in error.problems[0].message
        assert "ranks [0, 1]" in error.problems[0].message


def save_other_shapes(root: str) -> Any:
    own = {"embed.weight": torch.ones(6, 2)} if dist.get_rank() == 0 else {}
    own |= {"head.weight": torch.ones(4, 2)} if dist.get_rank() == 1 else {}
    with manager(root) as checkpoints:
        return error_of(lambda: checkpoints.save(1, {"model": own}))


def test_ends_of_other_shapes_are_refused_by_both_names(ranks, tmp_path):
    for error in ranks.run(save_other_shapes, 2, str(tmp_path)):
        assert isinstance(error, ReplicaMismatch)
        assert error.problems[0].where == "model.head.weight"
        assert "model.embed.weight, to which it is tied, (6, 2)" in error.problems[0].message


def save_head_alone(root: str) -> None:
    with manager(root) as checkpoints:
        checkpoints.save(1, {"model": {"head.weight": torch.arange(4.0)}})


def load_embed(root: str) -> tuple[list[float], int]:
    state = {"model": {"embed.weight": torch.zeros(4)}}
    with manager(root) as checkpoints:
        result = checkpoints.load(state)
    return state["model"]["embed.weight"].tolist(), len(result.report.items)


def test_an_end_whose_other_nobody_holds_is_stored_under_its_own_name(ranks, tmp_path):
    ranks.run(save_head_alone, 1, str(tmp_path))

    entry = newest_catalog(tmp_path)["model.head.weight"]
    assert (entry["kind"], entry["alias_of"]) == ("replicated", None)
    assert ranks.run(load_embed, 1, str(tmp_path)) == [([0.0, 1.0, 2.0, 3.0], 0)]


def load_untied(root: str) -> list[str]:
    state = {"model": {"embed.weight": torch.zeros(11, 4), "head.weight": torch.zeros(11, 4)}}
    with manager(root, {}, load=LoadOptions(parts=("model",))) as checkpoints:
        report = checkpoints.load({"model": {**state["model"], **layers()}}).report
    assert torch.equal(state["model"]["embed.weight"], state["model"]["head.weight"])
    return [str(item) for item in report.of(Severity.WARN)]


def layers() -> dict[str, torch.Tensor]:
    return {f"layers.{n}.weight": torch.zeros(4, 4) for n in range(2)}


def test_a_state_that_does_not_tie_them_is_warned(ranks, tmp_path):
    ranks.run(run_job, 2, str(tmp_path), 2, 1)

    (warnings,) = ranks.run(load_untied, 1, str(tmp_path))
    assert len(warnings) == 1
    assert "model.head.weight: the checkpoint ties it to model.embed.weight" in warnings[0]


def save_untied(root: str, is_equal: bool) -> None:
    ends = {"embed.weight": torch.ones(11, 4), "head.weight": torch.ones(11, 4)}
    if not is_equal:
        ends["head.weight"][3, 2] = 2.0
    part = "embed.weight" if dist.get_rank() == 0 else "head.weight"
    with manager(root, {}) as checkpoints:
        checkpoints.save(1, {"model": {part: ends[part]}})


def load_tied(root: str, accepted: bool) -> tuple[Any, float]:
    weight = torch.zeros(11, 4)
    overrides = {"tied": Severity.WARN} if accepted else {}
    with manager(root, {}, load=LoadOptions(overrides=overrides)) as checkpoints:
        state = {"model": {"embed.weight": weight, "head.weight": weight}}
        error = error_of(lambda: checkpoints.load(state))
    return error, float(weight.sum())


def test_ends_that_were_stored_apart_are_tied_only_if_they_are_equal(ranks, tmp_path):
    ranks.run(save_untied, 2, str(tmp_path / "equal"), True)
    ranks.run(save_untied, 2, str(tmp_path / "other"), False)

    assert ranks.run(load_tied, 1, str(tmp_path / "equal"), False) == [(None, 44.0)]
    ((error, changed),) = ranks.run(load_tied, 1, str(tmp_path / "other"), False)
    assert isinstance(error, LoadRefused)
    assert [(p.where, p.kind) for p in error.problems] == [("model.head.weight", "tied")]
    assert changed == 0
    assert ranks.run(load_tied, 1, str(tmp_path / "other"), True) == [(None, 44.0)]


def save_wrong_layers(root: str) -> Any:
    """Two stages that count their own layers from 0; the first rows are equal by chance."""
    weight = torch.ones(8, 4)
    weight[7] = float(dist.get_rank())
    model = {"layers.0.weight": weight, "layers.0.norm": torch.ones(4)}
    with manager(root) as checkpoints:
        return error_of(lambda: checkpoints.save(1, {"model": model}))


def test_45_layers_of_two_stages_under_one_name_are_refused_though_equal_in_part(ranks, tmp_path):
    for error in ranks.run(save_wrong_layers, 2, str(tmp_path)):
        assert isinstance(error, ReplicaMismatch)
        assert [p.where for p in error.problems] == ["model.layers.0.weight"]


WHOLE = torch.arange(44.0).reshape(11, 4)


def save_sharded_ends(root: str) -> None:
    """Two stages of two ranks, each end a DTensor on the mesh of its stage."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))["dp"]
    name = "embed.weight" if rank < 2 else "head.weight"
    with manager(root) as checkpoints:
        checkpoints.save(1, {"model": {name: distribute_tensor(WHOLE, mesh, [Shard(0)])}})


def load_sharded_ends(root: str) -> list[bool]:
    mesh = init_device_mesh("cpu", (3,))
    weight = distribute_tensor(torch.zeros(11, 4), mesh, [Shard(1)])
    with manager(root, {}) as checkpoints:
        report = checkpoints.load({"model": {"embed.weight": weight, "head.weight": weight}}).report
    return [torch.equal(weight.full_tensor(), WHOLE), report.severity is Severity.OK]


def test_ends_that_are_dtensors_of_two_stages(ranks, tmp_path):
    ranks.run(save_sharded_ends, 4, str(tmp_path))

    assert newest_catalog(tmp_path)["model.head.weight"]["alias_of"] == "model.embed.weight"
    assert ranks.run(load_sharded_ends, 3, str(tmp_path)) == [[True, True]] * 3
