"""Optimizer state by FQN: every optimizer, option and shape of group comes back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dcp_resume import (
    CheckpointManager,
    OptimizerState,
    SaveMode,
    Settings,
    Severity,
    errors,
)
from dcp_resume.session.load import LoadOptions

BLOCKING = Settings(mode=SaveMode.BLOCKING)


class Net(nn.Module):
    def __init__(self, order=("a", "b", "norm")):
        super().__init__()
        for name in order:
            self.add_module(name, nn.LayerNorm(6) if name == "norm" else nn.Linear(6, 6))

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))))


def net(seed=0, order=("a", "b", "norm")):
    torch.manual_seed(seed)
    made = Net()
    if order != ("a", "b", "norm"):
        other = Net(order)
        other.load_state_dict(made.state_dict())
        return other
    return made


def grouped(model):
    """Two groups of unlike options, in the order of the model's parameters."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    return [
        {"params": decay, "weight_decay": 0.1, "lr": 0.02},
        {"params": plain, "weight_decay": 0.0},
    ]


MAKERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01),
    "adamw-amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "adamw-foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True),
    "adamw-fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True),
    "adamw-groups": lambda m: torch.optim.AdamW(grouped(m), lr=0.01),
    "adamw-tensor-lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "sgd-groups": lambda m: torch.optim.SGD(grouped(m), lr=0.1, momentum=0.9),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "lbfgs": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
}


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("num_steps", [0, 3])
def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path, name, num_steps):
    model = net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, range(num_steps))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(num_steps, {"model": model, "optim": optimizer})
    expected = train(model, optimizer, range(num_steps, num_steps + 4))

    again = net(seed=1)
    fresh = MAKERS[name](again)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.resume({"model": again, "optim": fresh})
    assert train(again, fresh, range(num_steps, num_steps + 4)) == expected
    assert all(map(torch.equal, again.parameters(), model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "sgd-momentum", "adamw-groups"])
def test_21_permuted_parameter_order_changes_nothing(tmp_path, name):
    """INFINITRAIN 21: optimizer state is keyed by parameter name."""
    model = net()
    optimizer = MAKERS[name](model)
    train(model, optimizer, range(3))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer})
    expected = train(model, optimizer, range(3, 7))

    again = net(seed=1, order=("norm", "b", "a"))
    assert [n for n, _ in again.named_parameters()] != [n for n, _ in model.named_parameters()]
    fresh = MAKERS[name](again)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.resume({"model": again, "optim": fresh})
    assert train(again, fresh, range(3, 7)) == expected


def test_24_step_count_and_both_moments_come_back_exactly(tmp_path):
    """INFINITRAIN 24, with gradients that are not zero."""
    model = net()
    optimizer = MAKERS["adamw"](model)
    train(model, optimizer, range(3))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(3, {"model": model, "optim": optimizer})
    again = net(seed=1)
    fresh = MAKERS["adamw"](again)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.resume({"model": again, "optim": fresh})
    for old, new in zip(model.parameters(), again.parameters(), strict=True):
        saved, loaded = optimizer.state[old], fresh.state[new]
        assert saved.keys() == loaded.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)
        assert loaded["step"] == 3
        assert loaded["exp_avg"].abs().sum() > 0


def test_frozen_parameters_have_no_state_and_stay_frozen(tmp_path):
    model = net()
    model.a.requires_grad_(False)
    optimizer = MAKERS["adamw"](model)
    train(model, optimizer, range(2))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(2, {"model": model, "optim": optimizer})
    again = net(seed=1)
    again.a.requires_grad_(False)
    fresh = MAKERS["adamw"](again)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.resume({"model": again, "optim": fresh})
    assert again.a.weight not in fresh.state
    assert train(again, fresh, range(2, 5)) == train(model, optimizer, range(2, 5))


def test_resuming_neither_steps_nor_clears_gradients(tmp_path):
    model = net()
    optimizer = MAKERS["adamw"](model)
    train(model, optimizer, range(2))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(2, {"model": model, "optim": optimizer})
    again = net(seed=1)
    fresh = MAKERS["adamw"](again)
    again(torch.ones(1, 6)).sum().backward()
    gradient = again.a.weight.grad.clone()
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.resume({"model": again, "optim": fresh})
    assert torch.equal(again.a.weight.grad, gradient)
    assert fresh.state[again.a.weight]["step"] == 2


def test_a_live_optimizer_forgets_what_the_checkpoint_has_not(tmp_path):
    model = net()
    optimizer = MAKERS["adamw"](model)
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(0, {"model": model, "optim": optimizer})
        train(model, optimizer, range(2))
        checkpoints.load({"model": model, "optim": optimizer})
    assert not optimizer.state


def test_the_way_a_step_is_computed_stays_as_it_is_now(tmp_path):
    model = net()
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": MAKERS["adamw-foreach"](model)})
        fused = MAKERS["adamw-fused"](model)
        checkpoints.load({"model": model, "optim": fused})
    assert fused.param_groups[0]["fused"] is True
    assert not fused.param_groups[0]["foreach"]


def test_changed_options_are_said_and_the_saved_are_taken(tmp_path):
    model = net()
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": MAKERS["adamw"](model)})
        other = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.5, 0.6))
        report = checkpoints.load({"model": model, "optim": other}).report
    [item] = report.of(Severity.WARN)
    assert (item.kind, item.where) == ("optimizer", "optim.param_groups.0.betas")
    assert "saved (0.9, 0.999), now (0.5, 0.6)" in item.message
    assert other.param_groups[0]["betas"] == (0.9, 0.999)
    assert other.param_groups[0]["lr"] == 0.01


def test_groups_that_were_cut_otherwise_are_refused(tmp_path):
    model = net()
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": MAKERS["adamw-groups"](model)})
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(errors.LoadRefused, match="others; group them as they were") as caught:
            checkpoints.load({"model": model, "optim": MAKERS["adamw"](model)})
    assert {p.where for p in caught.value.problems} >= {"optim.param_groups.0.weight_decay"}
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_another_type_of_optimizer_is_refused_by_name(tmp_path):
    model = net()
    optimizer = MAKERS["sgd-momentum"](model)
    train(model, optimizer, range(1))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(1, {"model": model, "optim": optimizer})
        with pytest.raises(errors.LoadRefused, match=r"saved '\S+SGD', now '\S+AdamW'"):
            checkpoints.load({"model": model, "optim": MAKERS["adamw"](model)})


def test_a_parameter_of_no_model_has_no_name(tmp_path):
    stray = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)
    with (
        CheckpointManager(tmp_path, BLOCKING) as checkpoints,
        pytest.raises(errors.ConfigurationError, match="parameter 0 of group 0"),
    ):
        checkpoints.save(1, {"model": net(), "optim": stray})


class TestChoice:
    """INFINITRAIN 8, 9, 10: optimizer state is saved and loaded, or not, at the user's choice."""

    def test_08_left_out_leaves_no_optimizer_bytes(self, tmp_path):
        model = net()
        optimizer = MAKERS["adamw"](model)
        train(model, optimizer, range(1))
        settings = Settings(
            mode=SaveMode.BLOCKING,
            save_optimizer_state=OptimizerState.LEFT_OUT,
            load_optimizer_state=OptimizerState.LEFT_OUT,
        )
        with CheckpointManager(tmp_path, settings) as checkpoints:
            saved = checkpoints.save(1, {"model": model, "optim": optimizer}).result()
            names = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
            assert b"exp_avg" not in names
            assert saved.num_bytes < 2 * sum(p.nbytes for p in model.parameters()) + 10_000
            fresh = MAKERS["adamw"](model)
            checkpoints.load({"model": model, "optim": fresh})
        assert not fresh.state

    def test_09_works_without_any_optimizer_object(self, tmp_path):
        settings = Settings(
            mode=SaveMode.BLOCKING,
            save_optimizer_state=OptimizerState.LEFT_OUT,
            load_optimizer_state=OptimizerState.LEFT_OUT,
        )
        model = net()
        with CheckpointManager(tmp_path, settings) as checkpoints:
            checkpoints.save(1, {"model": model})
            assert checkpoints.load({"model": net(seed=1)}).step == 1

    def test_09_a_checkpoint_with_moments_loads_without_an_optimizer(self, tmp_path):
        model = net()
        optimizer = MAKERS["adamw"](model)
        train(model, optimizer, range(1))
        with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
            checkpoints.save(1, {"model": model, "optim": optimizer})
            with pytest.raises(errors.LoadRefused, match=r"optim\.param_groups"):
                checkpoints.load({"model": net()})
        settings = Settings(load_optimizer_state=OptimizerState.LEFT_OUT)
        again = net(seed=1)
        with CheckpointManager(tmp_path, settings) as checkpoints:
            checkpoints.load({"model": again})
        assert torch.equal(again.a.weight, model.a.weight)

    def test_09_asking_to_save_one_that_is_not_there_is_an_error(self, tmp_path):
        settings = Settings(save_optimizer_state=OptimizerState.REQUIRED)
        with CheckpointManager(tmp_path, settings) as checkpoints:
            with pytest.raises(errors.ConfigurationError, match="has no optimizer"):
                checkpoints.save(1, {"model": net()})
            assert checkpoints.latest() is None

    @pytest.mark.parametrize("is_in_state", [True, False])
    def test_10_asking_to_load_one_that_is_not_there_is_an_error(self, tmp_path, is_in_state):
        model = net()
        state = {"model": model}
        with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
            checkpoints.save(1, state)
        settings = Settings(
            load_optimizer_state=OptimizerState.REQUIRED,
            load=LoadOptions(overrides={"missing:optim.*": Severity.WARN}),
        )
        if is_in_state:
            state["optim"] = MAKERS["adamw"](model)
        message = "saved without an optimizer" if is_in_state else "the state has no optimizer"
        with (
            CheckpointManager(tmp_path, settings) as checkpoints,
            pytest.raises(errors.LoadRefused, match=message),
        ):
            checkpoints.load(state)


@pytest.mark.parametrize("compiled", [False, True])
def test_53_wrapper_prefixes_are_no_part_of_a_name(tmp_path, compiled):
    """INFINITRAIN 53; ``module.`` and ``_fsdp_wrapped_module.`` need ranks: tests/ranks."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net()
    optimizer = MAKERS["adamw"](model)
    train(model, optimizer, range(2))
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.save(2, {"model": model, "optim": optimizer})
    again = net(seed=1)
    again.a = checkpoint_wrapper(again.a)
    wrapped = torch.compile(again, backend="eager") if compiled else again
    fresh = MAKERS["adamw"](wrapped)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
        checkpoints.resume({"model": wrapped, "optim": fresh})
    assert train(again, fresh, range(2, 5)) == train(model, optimizer, range(2, 5))
