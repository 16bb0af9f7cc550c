"""Corners of one rank: odd names, states without tensors, fresh optimizers, what damage leaves."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dcp_resume import (
    Apply,
    CheckpointManager,
    Declarations,
    LoadOptions,
    Reader,
    SaveMode,
    Settings,
    Severity,
    Strictness,
    Writer,
)
from dcp_resume.errors import (
    CheckpointNotFound,
    ConfigurationError,
    CorruptData,
    LoadRefused,
    PartialLoad,
    RankSilent,
    UnsupportedLeaf,
)
from dcp_resume.manifest.models import TrainerFacts
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.merge import merge
from dcp_resume.planning.merged_shapes import CUT_BYTES, PIECES
from dcp_resume.planning.state import describe_state
from dcp_resume.session.commit import choose_newest
from dcp_resume.session.documents import Facts
from dcp_resume.session.incarnation import forget_incarnations, incarnation_of
from dcp_resume.session.ownership import own_run
from dcp_resume.session.run_log import RunLog
from dcp_resume.session.save import SaveSession
from dcp_resume.session.staging import Borrowed, BufferPool
from dcp_resume.session.votes import LonelyVotes
from dcp_resume.storage import open_store
from tests.support.damage import flip

BLOCKING = Settings(mode=SaveMode.BLOCKING)
LENIENT = Settings(mode=SaveMode.BLOCKING, load=LoadOptions(strictness=Strictness.IGNORE))
LARGE = 3_000_000
"""Elements: more than one read, so that some enter before a later one fails."""


@pytest.fixture
def run(tmp_path):
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        yield checkpoints


def filled(value: float, size: int = 2) -> torch.Tensor:
    return torch.full((size,), float(value))


def damage(root: Path, step: int) -> None:
    """Change the last byte of the largest file of a step."""
    files = root.glob(f"step-{step:08}/*/*.safetensors")
    flip(max(files, key=lambda path: path.stat().st_size), -1)


# Names.


@pytest.mark.parametrize(
    "name", ["__metadata__", "a\0b", "x" * 5000, "~leaves.a", "~per-rank.a", "\udc80"]
)
@pytest.mark.parametrize("leaf", [1, torch.ones(2)])
def test_a_name_that_no_reader_accepts_is_refused_before_anything_is_written(run, name, leaf):
    with pytest.raises(UnsupportedLeaf):
        run.save(1, {name: leaf})

    assert run.steps() == []
    assert not list(Path(run._store.url.removeprefix("file://")).glob("step-*"))


@pytest.mark.parametrize("name", ["", "/", "..", "é/#~", "#0", "a b", "W", "w"])
def test_odd_names_come_back(run, name):
    def state(value: float) -> dict[str, Any]:
        return {"top": {name: filled(value)}, name: {"k": filled(value + 1), "v": value}}

    run.save(1, state(5))
    found = state(0)
    run.load(found)

    assert str(found) == str(state(5))


def test_parts_whose_file_names_meet(run):
    def state(value: float) -> dict[str, Any]:
        return {name: {"w": filled(value + n)} for n, name in enumerate(["A", "A.2", "a", "a.2"])}

    run.save(1, state(5))
    found = state(0)
    run.load(found)

    assert str(found) == str(state(5))


def test_a_stock_planner_s_tensor_is_not_taken_for_another_one_s_chunk(tmp_path):
    """A dtype that stock readers cannot know is written as ``a#0``, which is a name too."""
    first, second = (torch.arange(4.0).reshape(2, 2) + n for n in (0, 10))
    state = {"a": torch.view_as_complex(first).to(torch.complex128)}
    state["a#0"] = torch.view_as_complex(second).to(torch.complex128)
    try:
        dcp.save(state, storage_writer=Writer(tmp_path, step=1))
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        dcp.load(found, storage_reader=Reader(tmp_path))
    finally:
        forget_incarnations()

    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


# Values.


def test_many_small_numbers_do_not_burst_the_manifest(run):
    state = {"sampler": {"order": list(range(10)) * 3000}, "flag": True}
    run.save(1, state)
    found: dict[str, Any] = {"sampler": {"order": []}, "flag": False}
    run.load(found)

    assert found == state


def test_a_truth_value_is_no_key(run):
    with pytest.raises(UnsupportedLeaf, match="mapping key True"):
        run.save(1, {"a": {True: 1}})


def test_from_rank_of_a_rank_that_does_not_exist(tmp_path):
    settings = Settings(mode=SaveMode.BLOCKING, declarations=Declarations(from_rank={"a": 3}))
    with (
        CheckpointManager(tmp_path, settings) as checkpoints,
        pytest.raises(ConfigurationError, match="from_rank"),
    ):
        checkpoints.save(1, {"a": 1, "w": filled(1)})


class Holder:
    """A Stateful whose state is whatever it was given."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def state_dict(self) -> dict[str, Any]:
        return dict(self.content)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.content = state_dict


def test_a_value_beside_a_tensor_in_a_tuple(run):
    run.save(1, {"s": Holder({"x": (filled(5), 5, ("deep", filled(6), 6))})})
    holder = Holder({"x": (filled(0), 0, ("", filled(0), 0))})
    run.load({"s": holder})

    assert str(holder.content) == str({"x": (filled(5), 5, ("deep", filled(6), 6))})


def test_an_object_without_state_stays_in_the_trainer_s_state(run):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = {"scaler": scaler, "w": filled(1)}
    run.save(1, state)
    run.load(state)

    assert state["scaler"] is scaler


# Optimizers before their first step.


def adam(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1, **options)


def weights_after_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.detach().clone()


@pytest.mark.parametrize("mode", list(SaveMode))
def test_a_save_at_step_0_changes_nothing(tmp_path, mode):
    expected = weights_after_steps(*adam())
    model, optimizer = adam()
    with CheckpointManager(tmp_path, Settings(mode=mode)) as checkpoints:
        checkpoints.save(0, {"model": model, "optim": optimizer})

    assert not optimizer.state
    assert torch.equal(weights_after_steps(model, optimizer), expected)


def test_resume_from_step_0_is_exact(run):
    expected = weights_after_steps(*adam())
    run.save(0, dict(zip(("model", "optim"), adam(), strict=True)))
    model, optimizer = adam()
    nn.init.zeros_(model.weight)
    run.load({"model": model, "optim": optimizer})

    assert torch.equal(weights_after_steps(model, optimizer), expected)


def test_damage_leaves_a_fresh_optimizer_fresh(tmp_path):
    model, optimizer = adam()
    weights_after_steps(model, optimizer)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": optimizer})
        damage(tmp_path, 1)
        model, optimizer = adam()
        with pytest.raises((PartialLoad, CorruptData)):
            checkpoints.load({"model": model, "optim": optimizer})

    assert not optimizer.state


# What damage leaves.


def test_a_whole_checkpoint_that_does_not_cover_is_not_quarantined(tmp_path):
    with CheckpointManager(tmp_path, LENIENT) as checkpoints:
        checkpoints.save(1, {"a": filled(1, LARGE)})
        checkpoints.save(2, {"a": filled(2, LARGE), "b": filled(2, LARGE), "c": filled(2, LARGE)})
        damage(tmp_path, 2)
        state = {name: filled(0, LARGE) for name in "abc"}
        with pytest.raises(PartialLoad, match="step 1, which is whole, does not hold them"):
            checkpoints.resume(state)

        assert checkpoints.steps() == [1]


def test_a_refusal_after_damage_does_not_say_that_nothing_changed(run, tmp_path):
    run.save(1, {"m": {"a": filled(1, LARGE), "b": filled(1, 3)}})
    run.save(2, {"m": {"a": filled(2, LARGE), "b": filled(2, LARGE)}})
    damage(tmp_path, 2)
    state = {"m": {"a": filled(0, LARGE), "b": filled(0, LARGE)}}

    with pytest.raises(PartialLoad) as caught:
        run.resume(state)

    assert "m.a" in caught.value.written_fqns
    assert isinstance(caught.value.__cause__, LoadRefused)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(tmp_path):
    state = {"a": filled(1)}
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, state)
    damage(tmp_path, 1)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints, pytest.raises(CorruptData):
        checkpoints.resume(state)
    for _ in range(2):  # a supervisor starts the job again and again
        with (
            CheckpointManager(tmp_path, BLOCKING) as checkpoints,
            pytest.raises(CheckpointNotFound, match="marked as damaged"),
        ):
            checkpoints.resume(state)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, state)  # asked
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        assert checkpoints.resume(state).step == 1


@pytest.mark.parametrize("apply", list(Apply))
def test_two_stored_tensors_do_not_mix_in_one_memory(tmp_path, apply):
    accepted = LoadOptions(apply=apply, overrides={"tied": Severity.WARN})
    settings = Settings(mode=SaveMode.BLOCKING, load=accepted)
    with CheckpointManager(tmp_path, settings) as checkpoints:
        checkpoints.save(1, {"m": {"a": filled(1, 2 * LARGE), "b": filled(2, 2 * LARGE)}})
        tied = filled(0, 2 * LARGE)
        with pytest.raises(LoadRefused, match=r"m\.b: the state ties it to m\.a"):
            checkpoints.load({"m": {"a": tied, "b": tied}}, options=LoadOptions(apply=apply))
        assert torch.equal(tied, filled(0, 2 * LARGE))
        result = checkpoints.load({"m": {"a": tied, "b": tied}})

    assert [item.kind for item in result.report.items] == ["tied"]
    assert torch.equal(tied, filled(1, 2 * LARGE))


# Plans and outcomes.


def test_a_tensor_that_many_ranks_hold_is_not_cut_into_crumbs():
    state = describe_state({"m": {"w": torch.ones(CUT_BYTES // 4, 1)}}, Declarations())
    plan = merge([local_plan(state, rank, 64, Declarations()) for rank in range(64)])

    sizes = plan.layout.chunks.sizes.prod(axis=1) * 4
    assert sizes.tolist() == [CUT_BYTES // PIECES] * PIECES


class Losing(LonelyVotes):
    """The store of the votes goes down once the coordinator has decided."""

    def round(self, phase: str, work: Any, decide: Any) -> bytes:
        answer = super().round(phase, work, decide)
        if phase == "report":
            raise RankSilent("the vote store is gone", step=1, ranks=(0,), phase=phase)
        return answer


def test_a_coordinator_that_lost_the_votes_still_knows_that_it_committed(tmp_path):
    store = open_store(str(tmp_path))
    log = RunLog(store)
    run = own_run(store, log, LonelyVotes(), choose_newest, is_probed=False)
    session = SaveSession(run, Losing(), step=1, facts=Facts(TrainerFacts(step=1)))
    session.stage({"w": filled(1)}, Borrowed(BufferPool()))

    assert session.finish().step == 1
    assert [record.step for record in log.refresh().commits.values()] == [1]


# DCP's door.


def test_writers_and_readers_can_be_pickled_before_and_after_their_use(tmp_path):
    try:
        writer = pickle.loads(pickle.dumps(Writer(tmp_path, step=1)))
        dcp.save({"w": filled(3)}, storage_writer=writer)
        reader = pickle.loads(pickle.dumps(Reader(tmp_path)))
        found = {"w": filled(0)}
        dcp.load(found, storage_reader=reader)
        again = {"w": filled(0)}
        dcp.load(again, storage_reader=pickle.loads(pickle.dumps(reader)))
    finally:
        forget_incarnations()

    assert pickle.loads(pickle.dumps(writer)).result.step == 1
    assert torch.equal(found["w"], filled(3))
    assert torch.equal(again["w"], filled(3))


def test_other_credentials_are_used_after_those_that_did_not_work():
    url = "memory://edges/credentials"
    try:
        first = incarnation_of(url, {"key": "wrong"})
        first.loaded_seq = 7
        second = incarnation_of(url, {"key": "right"})
        assert second.store is not first.store
        assert second.loaded_seq == 7
        second.loaded_seq = None
        run = second.own()
        assert incarnation_of(url, {"key": "other"}).run is run
    finally:
        forget_incarnations()
