"""``SaveMode.LAZY``: what is committed is the state at ``save``, whoever changes it when."""

from __future__ import annotations

import copy
import random
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from dcp_resume import CheckpointManager, SaveMode, Settings
from dcp_resume.errors import RankErrors, StateError
from dcp_resume.manager.step_memory import StepGuard, step_memory
from dcp_resume.session.copies import LateCopies

LAZY = Settings(mode=SaveMode.LAZY)
ROWS = 300
"""Enough for copies that are worth queueing."""


class Trainer:
    """A model with buffers, averaged weights and a tensor learning rate, and its optimizer."""

    def __init__(self, width: int, **options: Any) -> None:
        self.model = nn.Sequential(
            nn.Linear(width, ROWS), nn.BatchNorm1d(ROWS), nn.Linear(ROWS, width)
        )
        # torch has no foreach step with a tensor as the rate.
        lr = 0.1 if options.get("foreach") else torch.tensor(0.1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, **options)
        self.average = torch.optim.swa_utils.AveragedModel(self.model)

    @property
    def state(self) -> dict[str, Any]:
        average = self.average.state_dict()
        return {"model": self.model, "optim": self.optimizer, "average": average}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.model[0].in_features)).square().sum().backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.optimizer.param_groups[0]["lr"] *= 0.99  # in place, if it is a tensor

    def values(self) -> dict[str, torch.Tensor]:
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for number, state in enumerate(self.optimizer.state.values()):
            found |= {f"optim.{number}.{k}": v for k, v in state.items()}
        found["lr"] = torch.as_tensor(self.optimizer.param_groups[0]["lr"])
        return {name: value.detach().clone() for name, value in found.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_each_of_many_saves_has_the_state_at_its_call_while_the_trainer_races_on(tmp_path, options):
    torch.manual_seed(0)
    draw = random.Random(0)
    for number in range(4):
        trainer = Trainer(draw.choice([300, 401, 1024]), **options)
        trainer.step()
        twin = copy.deepcopy(trainer)
        expected: dict[int, dict[str, torch.Tensor]] = {}
        with CheckpointManager(tmp_path / str(number), LAZY) as checkpoints:
            for step in range(1, 6):
                expected[step] = trainer.values()
                checkpoints.save(step, trainer.state)
                for _ in range(draw.randrange(1, 4)):
                    trainer.step()
            checkpoints.wait()
            for step, values in expected.items():
                checkpoints.load(twin.state, step)
                assert_equal(twin.values(), values)


def held_back(state: dict[str, Any]) -> set[str]:
    """Which tensors of a state may be copied late."""
    memory = step_memory(state)
    model = state["model"]
    return {
        name for name, tensor in model.state_dict().items() if memory.owner_of(tensor) is not None
    }


def test_only_what_an_optimizers_step_alone_changes_is_copied_late():
    trainer = Trainer(16)
    linear = {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    assert held_back(trainer.state) == linear
    assert held_back({"model": trainer.model}) == set()
    trainer.step()
    memory = step_memory(trainer.state)
    moments = [s["exp_avg"] for s in trainer.optimizer.state.values()]
    assert all(memory.owner_of(moment) is not None for moment in moments)
    assert all(memory.owner_of(t) is None for t in trainer.average.state_dict().values())
    assert memory.owner_of(trainer.optimizer.param_groups[0]["lr"]) is None


def test_weights_that_a_forward_changes_and_memory_shared_with_buffers_are_copied_at_once():
    model = nn.ModuleDict({"a": nn.Embedding(9, 4, max_norm=1.0), "b": nn.Linear(4, 4)})
    model.register_buffer("alias", model["b"].weight.detach()[1:3])
    state = {"model": model, "optim": torch.optim.SGD(model.parameters())}
    assert held_back(state) == {"b.bias"}


def test_parts_of_a_flat_buffer_belong_to_the_parameter_that_they_lie_in():
    flat = torch.zeros(100)
    model = nn.ParameterList([nn.Parameter(flat[:40]), nn.Parameter(flat[60:].view(5, 8))])
    memory = step_memory({"model": model, "optim": torch.optim.SGD(model.parameters())})
    places = [flat[:40], flat[10:20], flat[60:], flat[30:50], flat[40:60], flat]
    assert [memory.owner_of(place) is not None for place in places] == [True] * 3 + [False] * 3


class ScheduleFree(torch.optim.SGD):
    """Has modes."""

    def eval(self) -> None:
        """Swaps weights."""


@pytest.mark.parametrize(
    "make",
    [ScheduleFree, lambda parameters: torch.optim.Adam(parameters, capturable=True)],
    ids=["modes", "graphs"],
)
def test_what_an_optimizer_changes_without_notice_is_copied_at_once(make):
    model = nn.Linear(8, 8)
    assert held_back({"model": model, "optim": make(model.parameters())}) == set()


def late_copies(num_tensors: int) -> tuple[LateCopies, nn.ParameterList, list[torch.Tensor]]:
    model = nn.ParameterList([torch.full((ROWS, ROWS), float(n)) for n in range(num_tensors)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    copies = LateCopies(step_memory({"model": model, "optim": optimizer}))
    places = [torch.zeros(ROWS, ROWS) for _ in model]
    for place, parameter in zip(places, model, strict=True):
        copies.copy(place.view(-1).view(torch.uint8), parameter.detach())
        parameter.grad = torch.ones_like(parameter)
    return copies, model, places


def test_nothing_is_copied_before_the_step_and_all_of_it_by_the_hook_of_any_optimizer():
    copies, model, places = late_copies(5)
    assert not copies.are_done
    assert all(not place.any() for place in places)
    guard = StepGuard()
    guard.watch(copies)
    try:
        torch.optim.SGD(model.parameters(), lr=1.0).step()  # another one, over the same parameters
    finally:
        guard.close()
    assert copies.are_done
    copies.finish()
    for number, (place, parameter) in enumerate(zip(places, model, strict=True)):
        assert torch.equal(place, torch.full((ROWS, ROWS), float(number)))
        assert torch.equal(parameter, torch.full((ROWS, ROWS), number - 1.0))


def test_threads_share_the_copies_and_each_returns_when_all_are_done():
    copies, _, places = late_copies(200)
    seen: list[bool] = []

    def drain() -> None:
        copies.drain()
        seen.append(all(bool((p == n).all()) for n, p in enumerate(places)))

    threads = [threading.Thread(target=drain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 4


def test_large_and_strided_tensors_arrive_whole():
    model = nn.ParameterList([torch.randn(5 << 20), torch.randn(700, 400).t()])
    memory = step_memory({"model": model, "optim": torch.optim.SGD(model.parameters())})
    copies = LateCopies(memory)
    places = [torch.zeros(parameter.shape) for parameter in model]
    for place, parameter in zip(places, model, strict=True):
        copies.copy(place.view(-1).view(torch.uint8), parameter.detach())
    assert not any(place.any() for place in places)
    copies.finish()
    assert all(torch.equal(p, w) for p, w in zip(places, model, strict=True))


def test_a_change_by_something_else_before_the_copy_fails_the_save_by_name():
    copies, model, _ = late_copies(3)
    with torch.no_grad():
        model[1].mul_(2)
    copies.drain()  # a step goes on
    with pytest.raises(StateError, match="wait_until_staged") as caught:
        copies.finish()
    assert [p.where for p in caught.value.problems] == ["optim.param_groups.0.params.1"]


def test_a_compiled_step_waits_for_the_copies_too():
    copies, model, places = late_copies(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = torch.compile(optimizer.step, backend="eager")
    step()
    with torch.no_grad():
        for number, parameter in enumerate(model):
            parameter.fill_(number)
    copies, model, places = late_copies(2)
    for parameter, source in zip(optimizer.param_groups[0]["params"], model, strict=True):
        parameter.data = source.data
    guard = StepGuard()
    guard.watch(copies)
    try:
        step()
        assert copies.are_done
    finally:
        guard.close()
    assert [float(place[0, 0]) for place in places] == [0.0, 1.0]


def test_an_abandoned_save_copies_no_more_and_lets_steps_pass():
    copies, _, places = late_copies(3)
    copies.abandon()
    copies.drain()
    assert all(not place.any() for place in places)


def test_a_trainer_may_change_all_after_it_waited_until_staged(tmp_path):
    trainer = Trainer(512)
    trainer.step()
    twin = copy.deepcopy(trainer)
    with CheckpointManager(tmp_path, LAZY) as checkpoints:
        expected = trainer.values()
        pending = checkpoints.save(1, trainer.state)
        pending.wait_until_staged()
        assert pending.is_staged
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.zero_()
        pending.result()
        checkpoints.load(twin.state, 1)
        assert_equal(twin.values(), expected)


def test_a_failed_lazy_save_does_not_stop_the_next_step_or_save(tmp_path):
    trainer = Trainer(512)
    trainer.step()
    with CheckpointManager(tmp_path, LAZY) as checkpoints:
        checkpoints.resume(trainer.state)
        with pytest.raises((RankErrors, StateError)):
            checkpoints.save(1, {**trainer.state, "bad": object()})
        trainer.step()
        assert checkpoints.save(2, trainer.state).result().step == 2


def test_an_interrupt_between_a_claim_and_its_copy_fails_the_save_and_hangs_nobody():
    model = nn.Linear(ROWS, ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    source = model.weight.detach()
    copies = LateCopies(step_memory({"model": model, "optim": optimizer}))
    copies.copy(torch.empty(source.nbytes, dtype=torch.uint8), source)

    def interrupt(frame, event, _):
        if event == "return" and frame.f_code.co_name == "_claim":
            raise KeyboardInterrupt
        return interrupt

    tracing = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            copies.drain()
    finally:
        sys.settrace(tracing)
    with pytest.raises(StateError, match="interrupted"):
        copies.finish()


class Flattened:
    """Parameters and moments under names of its own, as another trainer's wrapper gives them."""

    def __init__(self, trainer: Trainer) -> None:
        self.step_objects = (trainer.model, trainer.optimizer)
        self._model = trainer.model

    def state_dict(self):
        return dict(self._model.named_parameters())

    def load_state_dict(self, state_dict):
        self._model.load_state_dict(state_dict, strict=False)


def test_a_stateful_that_names_its_modules_and_optimizers_is_copied_late(tmp_path):
    trainer = Trainer(401, foreach=True)
    trainer.step()
    saved = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    state = {"model": Flattened(trainer)}
    memory = step_memory(state)
    assert memory.owner_of(trainer.model[0].weight.detach()) is not None
    with CheckpointManager(tmp_path, LAZY) as checkpoints:
        checkpoints.save(1, state)
        trainer.step()
        checkpoints.load(state, 1)
    assert_equal({n: p.detach() for n, p in trainer.model.named_parameters()}, saved)
