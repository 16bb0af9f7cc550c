"""``CheckpointManager`` on one rank: what is saved comes back, and faults surface once."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcp_resume import (
    CheckpointManager,
    LoadOptions,
    SaveMode,
    Settings,
    Strictness,
    TrainerState,
    WhenBusy,
)
from dcp_resume.errors import (
    CheckpointNotFound,
    CommitRefused,
    ConfigurationError,
    DuplicateFqn,
    Fenced,
    LoadRefused,
    StorageError,
    UnsupportedLeaf,
)
from dcp_resume.events import CheckpointCommitted, RunOpened, SaveFailed, subscribe
from tests.support.damage import small_files

BLOCKING = Settings(mode=SaveMode.BLOCKING)
LARGE = {"w": torch.zeros(50_000)}


@pytest.fixture(params=[SaveMode.BLOCKING, SaveMode.BACKGROUND])
def manager(request, tmp_path):
    with CheckpointManager(tmp_path, Settings(mode=request.param)) as checkpoints:
        yield checkpoints


@pytest.fixture
def seen():
    events: list[Any] = []
    unsubscribe = subscribe(events.append)
    yield events
    unsubscribe()


class Counter:
    """A Stateful."""

    def __init__(self) -> None:
        self.value: Any = 0

    def state_dict(self):
        return {"value": self.value, "seed": torch.tensor([1, 2])}

    def load_state_dict(self, state_dict):
        self.value = state_dict["value"]


def trained(seed, num_steps):
    """A small job, and its losses from then on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    job = {"model": model, "optim": optimizer, "schedule": scheduler, "trainer": TrainerState()}
    train(job, range(1, num_steps + 1))
    return job


def train(job, steps):
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = job["model"](torch.randn(8, 6)).square().mean()
        loss.backward()
        job["optim"].step()
        job["optim"].zero_grad()
        job["schedule"].step()
        job["trainer"].advance(step=step, samples=8, loss=loss.item())
        losses.append(loss.item())
    return losses


def test_a_resumed_run_is_bit_identical(manager):
    job = trained(0, 5)
    manager.save(5, job)
    expected = train(job, range(6, 11))

    resumed = trained(1, 0)
    result = manager.load(resumed)

    assert result.step == 5
    assert resumed["trainer"].consumed_samples == 40
    assert train(resumed, range(6, 11)) == expected
    assert resumed["schedule"].get_last_lr() == job["schedule"].get_last_lr()


def values_of_every_kind():
    return {
        "top": 5,
        "tensors": {
            "scalar": torch.tensor(1.5),
            "empty": torch.zeros(0, 3),
            "turned": torch.arange(12.0).reshape(3, 4).t(),
            "strided": torch.arange(10)[::2],
            "half": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
            "bits": torch.tensor([True, False]),
            "complex": torch.tensor([1 + 2j]),
            "conjugate": torch.tensor([1 + 2j]).conj(),
        },
        "nested": {"list": [1, [2, "x"]], "pair": (1, None), 7: {"deep": [torch.ones(2), 3]}},
        "odd": {"inf": math.inf, "big": 2**70, "text": "ä\n", "empty": {}, "none": None},
        "numpy": {"scalar": np.float32(0.5), "array": np.arange(3)},
    }


def blanked(value):
    """The same structure with other contents."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value.resolve_conj()).copy_(torch.full_like(value.real, 9))
    if isinstance(value, dict):
        return {key: blanked(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return [blanked(item) for item in value]
    return "blank"


def test_leaves_of_every_kind_come_back(manager):
    state = blanked(values_of_every_kind())
    manager.save(1, values_of_every_kind())

    manager.load(state)

    assert repr(state) == repr(values_of_every_kind())


def test_values_that_do_not_fit_the_manifest_go_to_a_data_file(manager, tmp_path):
    manager.save(1, {"data": {"table": list(range(20_000)), "n": 1}}).result()

    state = {"data": {"table": [], "n": 0}}
    manager.load(state)

    assert state == {"data": {"table": list(range(20_000)), "n": 1}}
    (manifest,) = tmp_path.rglob("manifest.json")
    assert manifest.stat().st_size < 10_000


def test_objects_with_a_state_dict(manager):
    counter, fresh = Counter(), Counter()
    counter.value = [{"a": 1}, (2, 3)]
    manager.save(1, {"counter": counter})

    manager.load({"counter": fresh})

    assert fresh.value == [{"a": 1}, (2, 3)]


def test_tied_weights_stay_tied(manager):
    def make(value):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        nn.init.constant_(model["embed"].weight, value)
        return model

    manager.save(1, {"model": make(2.0)})
    model = make(0.0)
    manager.load({"model": model})

    assert model["head"].weight is model["embed"].weight
    assert (model["head"].weight == 2).all()


def test_a_run_from_its_beginning(tmp_path, seen):
    state = {"n": 0}
    with CheckpointManager(tmp_path, Settings(save_interval=5)) as checkpoints:
        assert checkpoints.resume(state) is None
        assert checkpoints.latest() is None
        assert [step for step in range(12) if checkpoints.should_save(step)] == [5, 10]
        for step in (5, 10):
            checkpoints.save(step, {"n": step})
        checkpoints.wait()
        assert checkpoints.steps() == [5, 10]
        assert checkpoints.load(state, 5).step == 5
        assert state == {"n": 5}
    with CheckpointManager(tmp_path) as checkpoints:
        assert checkpoints.resume(state).step == 10
        assert state == {"n": 10}
    opened = [(e.generation, e.resume_step) for e in seen if isinstance(e, RunOpened)]
    assert opened == [(1, None), (2, 10)]
    assert [e.step for e in seen if isinstance(e, CheckpointCommitted)] == [5, 10]


def test_best(manager):
    trainer = TrainerState()
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, math.nan)]:
        trainer.advance(step=step, loss=loss)
        manager.save(step, {"trainer": trainer})
    other = TrainerState()

    assert manager.load({"trainer": other}, "best").step == 2
    assert (other.step, other.best_loss) == (2, 1.0)
    manager.wait()


def test_what_is_not_there(manager):
    with pytest.raises(CheckpointNotFound):
        manager.load({"n": 0})
    manager.save(1, {"n": 1})
    for step in (2, "best", "newest"):
        with pytest.raises(CheckpointNotFound) as caught:
            manager.load({"n": 0}, step)
        assert caught.value.request == str(step)
    with pytest.raises(ConfigurationError):
        manager.load({"n": 0}, "NEWEST")


def test_staged_state_may_change(manager):
    state = {"w": torch.ones(1_000_000)}
    pending = manager.save(1, state)
    state["w"].zero_()
    assert pending.result().step == 1
    manager.load(state)
    assert (state["w"] == 1).all()


def test_a_background_fault_surfaces_at_the_next_call_once(tmp_path, seen):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": torch.zeros(3)}).result()
        with small_files(100_000):
            pending = checkpoints.save(2, LARGE)
            pending.wait()
        assert pending.is_done
        assert not pending.is_committed
        with pytest.raises(StorageError):
            checkpoints.save(3, {"w": torch.zeros(3)})
        checkpoints.save(4, {"w": torch.zeros(3)})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 4]
    assert [e.step for e in seen if isinstance(e, SaveFailed)] == [2]


def test_a_background_fault_surfaces_at_close(tmp_path):
    checkpoints = CheckpointManager(tmp_path)
    checkpoints.save(1, {"n": 1}).result()
    with small_files(100_000):
        checkpoints.save(2, LARGE).wait()
    with pytest.raises(StorageError):
        checkpoints.close()
    checkpoints.close()  # said once; the second call has nothing to add


def test_a_fault_that_was_seen_is_not_raised_again(tmp_path):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"n": 1}).result()
        with small_files(100_000):
            pending = checkpoints.save(2, LARGE)
            with pytest.raises(StorageError):
                pending.result()


def test_a_blocking_fault(tmp_path, seen):
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"n": 1})
        with small_files(100_000), pytest.raises(StorageError):
            checkpoints.save(2, LARGE)
        checkpoints.save(3, {"n": 3})
        assert checkpoints.steps() == [1, 3]
    assert [e.step for e in seen if isinstance(e, SaveFailed)] == [2]


def test_one_step_is_saved_once_in_a_generation(tmp_path):
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"n": 1})
        with pytest.raises(CommitRefused):
            checkpoints.save(1, {"n": 2})
        checkpoints.resume({"n": 0})
        checkpoints.save(1, {"n": 2})


def test_a_zombie_is_fenced(tmp_path):
    state = {"n": 0}
    with CheckpointManager(tmp_path, BLOCKING) as zombie:
        zombie.save(1, {"n": 1})
        with CheckpointManager(tmp_path, BLOCKING) as successor:
            assert successor.resume(state).step == 1
            for step in (2, 3):
                with pytest.raises(Fenced):
                    zombie.save(step, {"n": step})
            successor.save(2, {"n": 22})
        with pytest.raises(Fenced):
            zombie.save(4, {"n": 4})
        assert zombie.steps() == [1, 2]
        zombie.load(state)
        assert state == {"n": 22}


def test_a_rollback_holds_before_its_first_save(tmp_path):
    state = {"n": 0}
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(10, {"n": 10})
        checkpoints.save(20, {"n": 20})
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        assert checkpoints.resume(state, 10).step == 10
    # Killed here: the next job must not go back to what was rolled back.
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        assert checkpoints.resume(state).step == 10
        assert state == {"n": 10}
        checkpoints.save(20, {"n": 99})
        assert checkpoints.steps() == [10, 20]
        checkpoints.load(state)
        assert state == {"n": 99}


def test_refused_loads_change_nothing(manager):
    model = nn.Linear(3, 2)
    manager.save(1, {"model": model, "n": 1})
    other = nn.Linear(3, 2)
    before = copy.deepcopy(other.state_dict())
    optimizer = torch.optim.AdamW(other.parameters())

    for state in ({"model": other}, {"model": other, "optim": optimizer, "n": 2}):
        with pytest.raises(LoadRefused):
            manager.load(state)
        assert repr(other.state_dict()) == repr(before)
    assert not optimizer.state
    lenient = LoadOptions(strictness=Strictness.IGNORE)
    assert manager.load({"model": other}, options=lenient).report.of(2) == ()


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"x": object()}, UnsupportedLeaf),
        ({"a": {"b.c": 1, "b": {"c": 2}}}, DuplicateFqn),
        ({"optim": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, ConfigurationError),
        ({"model": [nn.Linear(1, 1), nn.Linear(1, 1)]}, DuplicateFqn),
    ],
)
def test_states_that_cannot_be_saved(manager, state, error):
    with pytest.raises(error):
        manager.save(1, state)
    manager.save(2, {"n": 1}).result()


def test_trainer_and_step_must_agree(manager):
    with pytest.raises(ConfigurationError, match="trainer state is at step 0"):
        manager.save(1, {"trainer": TrainerState()})
    with pytest.raises(ConfigurationError, match="negative"):
        manager.save(-1, {"n": 0})


def test_parts_that_are_not_in_the_state(manager):
    manager.save(1, {"a": {"n": 1}})
    with pytest.raises(ConfigurationError, match="parts"):
        manager.load({"a": {"n": 0}}, options=LoadOptions(parts=("b",)))


@pytest.mark.parametrize(
    "options", [{"save_interval": -1}, {"deadline_s": 0}, {"monitor_mode": "least"}]
)
def test_settings_are_checked(options):
    with pytest.raises(ConfigurationError) as caught:
        Settings(**options)
    assert caught.value.option == next(iter(options))


def test_refusing_while_busy_lets_finished_saves_pass(tmp_path):
    settings = Settings(when_busy=WhenBusy.REFUSE)
    with CheckpointManager(tmp_path, settings) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"n": step}).result()
        assert checkpoints.steps() == [1, 2, 3]
