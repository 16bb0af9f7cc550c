"""What a trainer keeps beside its tensors: progress, random numbers, schedules, scalers, facts."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from dcp_resume import (
    CheckpointManager,
    RngState,
    SaveMode,
    Settings,
    Severity,
    TrainerState,
    errors,
)
from dcp_resume.cli.main import main
from dcp_resume.session.load import LoadOptions

BLOCKING = Settings(mode=SaveMode.BLOCKING)


def saved(tmp_path, step, state, **facts):
    with CheckpointManager(tmp_path, BLOCKING, **facts) as checkpoints:
        checkpoints.save(step, state)


def loaded(tmp_path, state, options=None, **facts):
    with CheckpointManager(tmp_path, BLOCKING, **facts) as checkpoints:
        return checkpoints.load(state, options=options)


def manifest_of(root):
    [path] = root.glob("step-*/*/manifest.json")
    return json.loads(path.read_text())


class TestTrainerState:
    def test_13_round_trips_exactly_with_non_finite_numbers(self, tmp_path):
        """INFINITRAIN 13, 14."""
        trainer = TrainerState(modes={"accuracy": "max", "bleu": "max"})
        trainer.advance(
            step=7, samples=56, tokens=2**60, loss=math.nan, last_lr=[1e-3, 0.1], epoch=2,
            metrics={"accuracy": 0.5, "bleu": math.inf}, duration_s=1.25,
        )  # fmt: skip
        saved(tmp_path, 7, {"trainer": trainer})
        again = TrainerState(modes={"accuracy": "max", "bleu": "max"})
        loaded(tmp_path, {"trainer": again})
        assert math.isnan(again.metrics.pop("loss"))
        trainer.metrics.pop("loss")
        assert again.lineage.pop().step == 7
        assert again == trainer
        assert (again.best_loss, again.best_step) == (math.inf, None)
        assert again.bests == {"accuracy": (0.5, 7), "bleu": (math.inf, 7)}
        facts = manifest_of(tmp_path)["trainer"]
        assert (facts["step"], facts["epoch"], facts["last_lr"]) == (7, 2, [1e-3, 0.1])

    def test_best_follows_the_mode_of_each_metric(self):
        trainer = TrainerState(modes={"accuracy": "max", "error": "min"})
        for step, value in enumerate([0.5, 0.7, 0.6, math.nan], 1):
            trainer.advance(step=step, metrics={"accuracy": value, "error": value, "other": value})
        assert trainer.bests == {"accuracy": (0.7, 2), "error": (0.5, 1)}
        with pytest.raises(errors.ConfigurationError, match="'min' or 'max'"):
            TrainerState(modes={"accuracy": "more"})

    def test_lineage_names_each_checkpoint_that_the_run_went_on_from(self, tmp_path):
        for step in (1, 2, 3):
            trainer = TrainerState()
            with CheckpointManager(tmp_path, BLOCKING) as checkpoints:
                checkpoints.resume({"trainer": trainer})
                trainer.advance(step=step)
                checkpoints.save(step, {"trainer": trainer})
        assert [(a.step, a.world_size) for a in trainer.lineage] == [(1, 1), (2, 1)]
        assert trainer.lineage[0].url == f"file://{tmp_path}"

    def test_a_newer_version_is_refused_before_anything_changes(self, tmp_path):
        model = nn.Linear(2, 2)
        state = TrainerState(step=1).state_dict()
        saved(tmp_path, 1, {"model": model, "trainer": {**state, "version": 99}})
        other = nn.Linear(2, 2)
        before = other.weight.clone()
        with pytest.raises(errors.LoadRefused, match="saved by version 99"):
            loaded(tmp_path, {"model": other, "trainer": TrainerState()})
        assert torch.equal(other.weight, before)

    def test_unknown_fields_of_a_newer_writer_are_refused_by_name(self, tmp_path):
        state = TrainerState(step=1).state_dict()
        saved(tmp_path, 1, {"trainer": {**state, "horizon": 3}})
        with pytest.raises(errors.LoadRefused, match=r"trainer\.horizon"):
            loaded(tmp_path, {"trainer": TrainerState()})

    def test_samples_that_contradict_the_data_are_refused(self, tmp_path):
        class Data:
            consumed_samples = 672

            def state_dict(self):
                return {"n": self.consumed_samples}

            def load_state_dict(self, state_dict):
                self.consumed_samples = state_dict["n"]

        trainer = TrainerState()
        trainer.advance(step=10, samples=640)
        with pytest.raises(errors.ConfigurationError, match=r"672 samples.*640.*of 32"):
            saved(tmp_path, 10, {"trainer": trainer, "data": Data()})


def draws():
    return (
        random.random(),
        float(np.random.rand()),
        torch.rand(3).tolist(),
        random.gauss(0, 1),
        float(np.random.randn()),
    )


class TestRandomNumbers:
    """INFINITRAIN 48."""

    def test_48_every_generator_goes_on_where_it_was(self, tmp_path):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        draws()
        saved(tmp_path, 1, {"rng": RngState()})
        expected = [draws() for _ in range(3)]
        random.seed(9), np.random.seed(9), torch.manual_seed(9)
        loaded(tmp_path, {"rng": RngState()})
        assert [draws() for _ in range(3)] == expected

    def test_saving_draws_nothing(self, tmp_path):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        expected = draws()
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        saved(tmp_path, 1, {"rng": RngState()})
        assert draws() == expected

    def test_other_streams_are_derived_alike_at_each_resume_and_the_report_says_so(self, tmp_path):
        saved(tmp_path, 1, {"rng": RngState(seed=5)})
        found = []
        for stream in (0, 1, 1):
            report = loaded(
                tmp_path, {"rng": RngState(seed=6, stream=stream, num_streams=2)}
            ).report
            [item] = report.of(Severity.WARN)
            assert (item.kind, item.where) == ("rng", "rng")
            assert "saved for 1 random stream(s), now 2" in item.message
            assert "seed 5" in item.message
            found.append(draws())
        assert found[1] == found[2]
        assert found[0] != found[1]

    def test_a_checkpoint_without_random_numbers_is_refused_by_name(self, tmp_path):
        saved(tmp_path, 1, {"x": torch.ones(1)})
        with pytest.raises(errors.LoadRefused, match=r"rng\.torch"):
            loaded(tmp_path, {"x": torch.ones(1), "rng": RngState()})

    def test_a_stream_beyond_their_number_is_refused(self):
        with pytest.raises(errors.ConfigurationError, match="got 2 of 2"):
            RngState(stream=2, num_streams=2)


def sequential(optimizer):
    return schedules.SequentialLR(
        optimizer,
        [schedules.ConstantLR(optimizer, 0.1, 3), schedules.ExponentialLR(optimizer, 0.9)],
        milestones=[3],
    )


SCHEDULES = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (step + 1)),
    "step": lambda o: schedules.StepLR(o, 2, 0.5),
    "multistep": lambda o: schedules.MultiStepLR(o, [2, 5], 0.5),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 9),
    "warm-restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, 2),
    "one-cycle": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=20),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "polynomial": lambda o: schedules.PolynomialLR(o, 12),
    "sequential": sequential,
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ExponentialLR(o, 0.9), schedules.StepLR(o, 3)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_27_learning_rate_schedules_are_restored_not_just_recorded(tmp_path, name):
    """INFINITRAIN 27."""

    def job():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"model": model, "optim": optimizer, "schedule": SCHEDULES[name](optimizer)}

    def advance(state, steps):
        rates = []
        for _ in range(steps):
            state["optim"].step()
            state["schedule"].step()
            rates.append(state["optim"].param_groups[0]["lr"])
        return rates

    state = job()
    advance(state, 4)
    saved(tmp_path, 4, state)
    again = job()
    loaded(tmp_path, again)
    assert advance(again, 6) == advance(state, 6)


def test_a_plateau_schedule_is_restored(tmp_path):
    def job():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, schedules.ReduceLROnPlateau(optimizer, patience=1)

    optimizer, schedule = job()
    for _ in range(2):
        schedule.step(1.0)
    saved(tmp_path, 1, {"schedule": schedule})
    other, again = job()
    loaded(tmp_path, {"schedule": again})
    schedule.step(1.0), again.step(1.0)
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.1


def test_48_a_gradient_scaler_is_restored(tmp_path):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    first = scaler()
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        first.scale((weight * factor).sum()).backward()
        first.step(optimizer)
        first.update()
    saved(tmp_path, 1, {"scaler": first})
    again = scaler()
    loaded(tmp_path, {"scaler": again})
    assert again.state_dict() == first.state_dict()
    assert again.get_scale() == 512.0


FACTS = {"n_layer": 12, "n_head": 12, "n_kv_head": 12, "n_embd": 768, "vocab_size": 50257}


class TestDrift:
    @pytest.mark.parametrize("name", FACTS)
    def test_19_each_fact_of_the_model_refuses_with_both_values_named(self, tmp_path, name):
        """INFINITRAIN 19: also where every tensor would fit."""
        saved(tmp_path, 1, {"x": torch.ones(1)}, model_facts=FACTS)
        other, target = {**FACTS, name: 7}, torch.zeros(1)
        with pytest.raises(errors.LoadRefused, match=f"{name}: saved {FACTS[name]}, now 7"):
            loaded(tmp_path, {"x": target}, model_facts=other)
        assert target == 0
        accepted = LoadOptions(overrides={f"model:{name}": Severity.WARN})
        report = loaded(tmp_path, {"x": target}, accepted, model_facts=other).report
        assert [item.where for item in report.of(Severity.WARN)] == [name]
        assert target == 1

    def test_other_data_refuses_and_other_precision_warns(self, tmp_path):
        state = {"x": torch.ones(1)}
        facts = {"data_facts": {"corpus": "a"}, "precision_facts": {"autocast": "bfloat16"}}
        saved(tmp_path, 1, state, **facts)
        with pytest.raises(errors.LoadRefused, match="corpus: saved 'a', now 'b'"):
            loaded(tmp_path, state, data_facts={"corpus": "b"})
        report = loaded(tmp_path, state, precision_facts={"autocast": "float16"}).report
        [item] = report.of(Severity.WARN)
        assert str(item) == "warn: autocast: saved 'bfloat16', now 'float16' [precision]"

    def test_13_notes_are_shown_and_never_compared(self, tmp_path, capsys):
        """INFINITRAIN 13, 20: parallel sizes, of which a load on others is no fault."""
        state, run = {"x": torch.ones(1)}, tmp_path / "a"
        notes = {"tensor_parallel": 2, "data_parallel": "fsdp"}
        saved(run, 1, state, notes=notes)
        report = loaded(run, state, notes={"tensor_parallel": 4, "data_parallel": "ddp"}).report
        assert report.items == ()
        assert main(["inspect", str(run)]) == 0
        shown = capsys.readouterr().out
        assert "note         data_parallel: 'fsdp'\nnote         tensor_parallel: 2\n" in shown
        assert manifest_of(run)["notes"] == notes
        assert main(["reshard", str(run), str(tmp_path / "b"), "--to", "dp=1"]) == 0
        assert manifest_of(tmp_path / "b")["notes"] == {}  # the sizes would no longer be true

    def test_switches_of_torch_are_facts(self, tmp_path):
        state = {"x": torch.ones(1)}
        saved(tmp_path, 1, state)
        torch.use_deterministic_algorithms(True)
        try:
            report = loaded(tmp_path, state).report
        finally:
            torch.use_deterministic_algorithms(False)
        assert [i.where for i in report.of(Severity.WARN)] == ["deterministic_algorithms"]

    def test_an_override_cannot_make_shapes_fit(self, tmp_path):
        saved(tmp_path, 1, {"x": torch.ones(2)})
        options = LoadOptions(overrides={"*": Severity.OK})
        with pytest.raises(errors.LoadRefused, match="shape"):
            loaded(tmp_path, {"x": torch.ones(3)}, options)

    def test_another_torch_is_a_warning(self, tmp_path):
        from dcp_resume.manager.drift import fact_differences
        from dcp_resume.manifest.models import TrainerFacts
        from dcp_resume.manifest.wire import decode_manifest
        from dcp_resume.session.documents import Facts

        saved(tmp_path, 1, {"x": torch.ones(2)})
        [path] = tmp_path.glob("step-*/*/manifest.json")
        manifest = decode_manifest(path.read_bytes(), "manifest.json")
        software = manifest.software.model_copy(update={"torch": "1.0", "python": "2.7"})
        older = manifest.model_copy(update={"software": software})
        items = sorted(fact_differences(older, Facts(TrainerFacts(step=1))))
        assert [(i.severity, i.where) for i in items] == [
            (Severity.OK, "python"),
            (Severity.WARN, "torch"),
        ]
