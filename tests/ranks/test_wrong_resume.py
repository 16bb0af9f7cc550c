"""A wrong resume of each kind is named by a typed error or the report before the first step."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dcp_resume import (
    CheckpointManager,
    LoadOptions,
    RngState,
    SaveMode,
    Settings,
    Severity,
    TrainerState,
)
from dcp_resume.data import ResumableLoader, ResumableSampler, Tail
from dcp_resume.errors import (
    ConfigurationError,
    LoadRefused,
    RankErrors,
    ReplicaMismatch,
)
from tests.ranks.test_agreement import BLOCKING, DEADLINE_S, error_of

pytestmark = pytest.mark.ranks

# Random numbers.


def resume_random(root: str, rng: RngState | None, *, is_first: bool = False) -> tuple[Any, Any]:
    """The error, and the kinds of the warnings in the report."""
    state = {"x": torch.ones(1), **({} if rng is None else {"rng": rng})}
    with CheckpointManager(root, BLOCKING) as checkpoints:
        if is_first:
            seed = dist.get_rank()
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            return error_of(lambda: checkpoints.save(1, state)), None
        reports: list[Any] = []
        error = error_of(lambda: reports.append(checkpoints.resume(state)))
    return error, [(i.kind, i.where) for r in reports for i in r.report.of(Severity.WARN)]


def resume_random_in_wrong_ways(root: str) -> list[Any]:
    shifted = (dist.get_rank() + 1) % dist.get_world_size()
    ways = (None, RngState(stream=shifted, num_streams=dist.get_world_size()), RngState())
    return [resume_random(root, way) for way in ways]


def save_random_as_any_value(root: str) -> Any:
    torch.manual_seed(dist.get_rank())
    with CheckpointManager(root, BLOCKING) as checkpoints:
        state = {"rng": {"torch": torch.get_rng_state()}}
        return error_of(lambda: checkpoints.save(1, state))


def test_a_wrong_resume_with_the_random_numbers_of_another_rank_is_named(ranks, tmp_path):
    """At the save: a state that is kept once, and is another on each rank.

    At the load: random numbers that nobody takes, and ranks in another order or number. Nothing
    catches a job that copies one rank's generators to all ranks by itself before it saves them.
    """
    for error in ranks.run(save_random_as_any_value, 3, str(tmp_path / "any")):
        assert isinstance(error, ReplicaMismatch)
        assert [p.where for p in error.problems] == ["rng.torch"]

    root = str(tmp_path / "run")
    ranks.run(save_random, 3, root)
    for left_out, other_order, right in ranks.run(resume_random_in_wrong_ways, 3, root):
        assert isinstance(left_out[0], LoadRefused)
        assert {p.where for p in left_out[0].problems} >= {"rng.torch", "rng.python"}
        assert other_order == (None, [("rng", "rng")])
        assert right == (None, [])
    for *_, other_number in ranks.run(resume_random_in_wrong_ways, 2, root):
        assert other_number[0] is None
        assert ("rng", "rng") in other_number[1]


def save_random(root: str) -> None:
    assert resume_random(root, RngState(), is_first=True)[0] is None


# Moments.


class Wrapped:
    """A Stateful that hides an optimizer, and says what the optimizer says."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["inner"])


@pytest.mark.parametrize(
    ("is_wrapped", "place"), [(False, "['optim']"), (True, "['optim']['inner']")]
)
def test_a_wrong_resume_of_moments_by_the_position_of_their_parameter_is_named(
    tmp_path, is_wrapped, place
):
    """Equal shapes, in another order: nothing but the names of parameters tells them apart.

    So positions are refused, at the save and at the load. Under an optimizer that is handed in
    itself the order may change: tests/unit/test_optimizers.py, number 21.
    """

    def job(order: tuple[str, ...]) -> dict[str, Any]:
        model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in order})
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        by_position = Wrapped(optimizer) if is_wrapped else optimizer.state_dict()
        return {"model": model, "optim": by_position}

    with CheckpointManager(tmp_path, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        with pytest.raises(ConfigurationError, match="numbers the parameters") as caught:
            checkpoints.save(1, job(("a", "b")))
        assert caught.value.option == place
        checkpoints.save(1, {"model": job(("a", "b"))["model"]})
        with pytest.raises(ConfigurationError, match="numbers the parameters"):
            checkpoints.load(job(("b", "a")))


# Data.


class BatchCounter:
    """A loader of somebody's own, which counts batches and knows no samples."""

    batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batch = state_dict["batch"]


def loader(**split: int) -> ResumableLoader:
    options = {"global_batch": 8, "micro_batch": 4, "tail": Tail.DROP, **split}
    return ResumableLoader(range(96), ResumableSampler(96, **options), collate_fn=list)


def after_two_steps() -> ResumableLoader:
    data = loader()
    batches = iter(data)
    for _ in range(4):
        next(batches)
    return data


def test_a_wrong_resume_of_the_data_under_another_batch_is_named_with_the_arithmetic(tmp_path):
    """Our loader counts samples, so that nothing shifts, and refuses what cannot go on.

    One that counts batches cannot be seen through: its batch size must be among ``data_facts``.
    """
    settings, data = Settings(mode=SaveMode.BLOCKING), after_two_steps()
    rest = [sample for batch in data for sample in batch]
    with CheckpointManager(tmp_path / "ours", settings) as checkpoints:
        checkpoints.save(2, {"data": after_two_steps()})
        with pytest.raises(LoadRefused, match=r"16 consumed samples .* global batch 12") as caught:
            checkpoints.load({"data": loader(global_batch=12)})
        assert [p.where for p in caught.value.problems] == ["data.global_batch"]
        for split in ({"global_batch": 16}, {"micro_batch": 2}, {"num_ranks": 2}):
            other = loader(**split)
            report = checkpoints.load({"data": other}).report
            assert [f"data.{name}" for name in split] == [item.where for item in report.items]
            assert other.consumed_samples == 16
            if "num_ranks" not in split:
                assert [sample for batch in other for sample in batch] == rest

    facts = {"data_facts": {"global_batch": 8}}
    with CheckpointManager(tmp_path / "other", settings, **facts) as checkpoints:
        checkpoints.save(2, {"data": BatchCounter()})
    facts = {"data_facts": {"global_batch": 16}}
    with (
        CheckpointManager(tmp_path / "other", settings, **facts) as checkpoints,
        pytest.raises(LoadRefused, match="global_batch: saved 8, now 16"),
    ):
        checkpoints.load({"data": BatchCounter()})


def test_a_wrong_resume_of_data_a_batch_ahead_of_the_training_is_named_at_the_save(tmp_path):
    trainer = TrainerState()
    trainer.advance(step=1, samples=8)
    state = {"trainer": trainer, "data": after_two_steps()}
    with CheckpointManager(tmp_path, Settings(mode=SaveMode.BLOCKING)) as checkpoints:
        with pytest.raises(ConfigurationError, match="a difference of 8"):
            checkpoints.save(1, state)
        assert checkpoints.latest() is None


# Twelve layers on two pipeline ranks, of one or of two virtual stages each: which layers a rank
# holds follows from the schedule, what it calls them from the job.

NUM_LAYERS = 12
HELD = {
    1: ((range(6),), (range(6, 12),)),
    2: ((range(3), range(6, 9)), (range(3, 6), range(9, 12))),
}
"""Virtual stages of a rank → per rank, the layers of each."""


def globally(rank: int, num_virtual: int) -> list[list[int]]:
    """The right names."""
    return [list(layers) for layers in HELD[num_virtual][rank]]


def within_all_ranks(rank: int, num_virtual: int) -> list[list[int]]:
    """As if a rank held neighbours: each name once, and right for one virtual stage only."""
    numbers = iter(range(6 * rank, 6 * rank + 6))
    return [[next(numbers) for _ in layers] for layers in HELD[num_virtual][rank]]


def within_the_rank(rank: int, num_virtual: int) -> list[list[int]]:
    """Each rank counts from 0."""
    return within_all_ranks(0, num_virtual)


def within_the_stage(rank: int, num_virtual: int) -> list[list[int]]:
    """Each virtual stage counts from 0."""
    return [list(range(len(layers))) for layers in HELD[num_virtual][rank]]


class Stage(nn.Module):
    """Layers of equal shapes, each full of its true number."""

    def __init__(self, layers: range, names: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for layer, name in zip(layers, names, strict=True):
            self.layers[str(name)] = nn.Linear(2, 2, bias=False)
            nn.init.constant_(self.layers[str(name)].weight, float(layer))


def state_of(name: Any, num_virtual: int) -> dict[str, Any]:
    rank = dist.get_rank()
    held = zip(HELD[num_virtual][rank], name(rank, num_virtual), strict=True)
    stages = [Stage(layers, names) for layers, names in held]
    return {"model": stages, "optim": [torch.optim.SGD(s.parameters(), lr=1.0) for s in stages]}


def save_stages(root: str, name: Any, num_virtual: int) -> Any:
    with CheckpointManager(root, BLOCKING) as checkpoints:
        return error_of(lambda: checkpoints.save(1, state_of(name, num_virtual)))


def load_stages(root: str, name: Any, num_virtual: int, **options: Any) -> tuple[Any, bool, bool]:
    """The error, whether any tensor was written, and whether each layer has its own weights."""
    state = state_of(name, num_virtual)
    parameters = [p for stage in state["model"] for p in stage.parameters()]
    true = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(-1.0)
    settings = Settings(mode=SaveMode.BLOCKING, deadline_s=DEADLINE_S, load=LoadOptions(**options))
    with CheckpointManager(root, settings) as checkpoints:
        error = error_of(lambda: checkpoints.resume(state))
    is_changed = any((p != -1).any().item() for p in parameters)
    return error, is_changed, all(map(torch.equal, parameters, true))


LAYER = "model.layers.{}.weight"


def all_numberings(root: str) -> dict[str, Any]:
    """Save under each wrong numbering that a save can tell, and load into each."""
    found: dict[str, Any] = {}
    for name in (within_the_stage, within_the_rank):
        found[f"save {name.__name__}"] = save_stages(f"{root}/{name.__name__}", name, 2)
    assert save_stages(f"{root}/one", globally, 1) is None
    assert save_stages(f"{root}/two", within_all_ranks, 2) is None
    for name in (within_the_stage, within_the_rank, within_all_ranks, globally):
        found[f"load {name.__name__}"] = load_stages(f"{root}/one", name, 2)
    found["load into one"] = load_stages(f"{root}/two", globally, 1)
    found["load into the same two"] = load_stages(f"{root}/two", within_all_ranks, 2)
    accepted = {"stages": Severity.OK}
    found["accepted"] = load_stages(f"{root}/one", within_all_ranks, 2, overrides=accepted)
    return found


def test_a_wrong_resume_of_layers_under_other_virtual_stages_is_named(ranks, tmp_path):
    """Twelve layers of equal shapes: only their names tell them apart.

    At the save: names that collide within a rank, or between ranks whose layers differ. (Layers
    that are equal, as after an initialisation to a constant, are no loss then; a later save tells.)
    At the load: names that collide, names that nobody asks for, and names that are all there but
    were given out rank by rank, on the side of the checkpoint or of the job. The last is seen where
    no rank's virtual stages have a gap between them and their number has changed; a job of one
    virtual stage a rank that calls its layers wrongly cannot be seen through.
    """
    for found in ranks.run(all_numberings, 2, str(tmp_path)):
        for action in ("save within_the_stage", "load within_the_stage"):
            error = found[action] if action.startswith("save") else found[action][0]
            assert isinstance(error, RankErrors)
            assert "DuplicateFqn: model.layers.0.weight" in error.errors[0]
        error = found["save within_the_rank"]
        assert isinstance(error, ReplicaMismatch)
        assert {p.where for p in error.problems} == {LAYER.format(n) for n in range(6)}

        error, is_changed, _ = found["load within_the_rank"]
        assert isinstance(error, LoadRefused)
        wanted = {("unexpected", LAYER.format(n)) for n in range(6, 12)}
        assert {(p.kind, p.where) for p in error.problems} >= wanted
        assert not is_changed
        for action in ("load within_all_ranks", "load into one"):
            error, is_changed, _ = found[action]
            assert isinstance(error, LoadRefused)
            assert [(p.kind, p.where) for p in error.problems] == [("stages", "topology.stages")]
            assert not is_changed

        assert found["load globally"] == (None, True, True)
        assert found["load into the same two"] == (None, True, True)
        assert found["accepted"] == (None, True, False)  # swapped, as was refused above
