"""A loop on Lightning's Fabric, stopped and resumed: as if it had never been stopped."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric, seed_everything

from dcp_resume import CheckpointManager, RngState, SaveMode, Settings, TrainerState
from dcp_resume.adapters.lightning import behind_fabric
from dcp_resume.data import ResumableLoader, ResumableSampler

pytestmark = pytest.mark.adapters


def train(root, stop_after):
    """Losses by step, final weights, and the step that was resumed from."""
    seed_everything(7, verbose=False)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    layers = (torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    samples = torch.linspace(-1, 1, 80).reshape(20, 4)
    sampler = ResumableSampler(20, global_batch=2, micro_batch=2, seed=1)
    data, trainer = ResumableLoader(samples, sampler), TrainerState()
    state = {
        "model": model,
        "optim": optimizer,
        "data": data,
        "trainer": trainer,
        "rng": RngState(),
    }
    settings, losses = Settings(save_interval=3, mode=SaveMode.BLOCKING), {}
    with CheckpointManager(root, settings) as checkpoints:
        resumed = checkpoints.resume(behind_fabric(state))
        while trainer.step < stop_after:
            for inputs in data:
                optimizer.zero_grad()
                loss = (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()
                fabric.backward(loss)
                optimizer.step()
                trainer.advance(step=trainer.step + 1, samples=2, loss=loss.item())
                losses[trainer.step] = loss.item()
                if checkpoints.should_save(trainer.step):
                    checkpoints.save(trainer.step, behind_fabric(state))
                if trainer.step == stop_after:
                    break
        assert checkpoints.latest() == stop_after // 3 * 3
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return losses, weights, resumed.step if resumed else None


def test_a_resumed_loop_equals_one_that_was_never_stopped(tmp_path):
    losses, weights, _ = train(tmp_path / "straight", 24)
    train(tmp_path / "stopped", 14)
    resumed_losses, resumed_weights, step = train(tmp_path / "stopped", 24)
    assert step == 12
    assert resumed_losses == {n: losses[n] for n in range(13, 25)}
    torch.testing.assert_close(resumed_weights, weights, rtol=0, atol=0)


def test_names_are_those_of_the_model_without_fabric(tmp_path):
    model = torch.nn.Linear(2, 2)
    wrapped = Fabric(accelerator="cpu", devices=1).setup(model)
    assert behind_fabric({"model": wrapped, "n": 1}) == {"model": model, "n": 1}
