"""``Preemption`` on one rank: from the notice to the exit code."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dcp_resume import (
    CheckpointManager,
    LoadOptions,
    Notice,
    OptimizerState,
    Preemption,
    PreemptionSettings,
    SaveMode,
    Settings,
    Severity,
    WhenShort,
)
from dcp_resume.errors import ConfigurationError, LoadRefused
from dcp_resume.events import (
    CheckpointCommitted,
    PreemptionFinished,
    StepReached,
    emit,
    subscribe,
)
from tests.support.damage import small_files

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
QUICK = {"poll_s": 0.01, "sources_interval_s": 0.01}


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def actions():
    found: list[str] = []
    unsubscribe = subscribe(
        lambda event: isinstance(event, PreemptionFinished) and found.append(event.action)
    )
    yield found
    unsubscribe()


def make_state() -> dict[str, Any]:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {"model": model, "optim": optimizer}


def train_until_stopped(preemption: Preemption) -> int:
    """The step it is stopped at; a step takes a moment, as steps do."""
    for step in itertools.count(1):
        time.sleep(0.001)
        if preemption.should_stop(step):
            return step
    raise AssertionError


def leave(
    checkpoints: CheckpointManager,
    settings: PreemptionSettings,
    act: Callable[[], object] = lambda: None,
) -> tuple[int, int]:
    """Train until a notice, save and exit: the step, and the exit code."""
    try:
        with Preemption(checkpoints, settings) as preemption:
            act()
            step = train_until_stopped(preemption)
            preemption.save_and_exit(step, make_state())
    except SystemExit as left:
        return step, left.code


@pytest.mark.parametrize("mode", list(SaveMode))
def test_a_signal_saves_and_exits_with_75(tmp_path, actions, mode):
    with CheckpointManager(tmp_path, Settings(mode=mode)) as checkpoints:
        step, code = leave(
            checkpoints, PreemptionSettings(), lambda: os.kill(os.getpid(), signal.SIGTERM)
        )
        assert code == 75
        assert checkpoints.steps() == [step]
    assert actions == ["save"]
    # The launcher may signal again: that shall not kill a process that is leaving.
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_sources_of_notices(tmp_path):
    given = iter([None, Notice("spot", 120.0)])
    with CheckpointManager(tmp_path) as checkpoints:
        step, code = leave(
            checkpoints, PreemptionSettings(sources=[lambda: next(given)], exit_code=99, **QUICK)
        )
        assert (checkpoints.latest(), code) == (step, 99)
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.resume(make_state())
        step, _ = leave(checkpoints, PreemptionSettings(exit_after_s=0.05, **QUICK))
        assert checkpoints.latest() == step


def test_slurm_says_when_the_allocation_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    with CheckpointManager(tmp_path) as checkpoints:
        settings = PreemptionSettings(**QUICK)
        step, _ = leave(checkpoints, settings)
        assert checkpoints.latest() == step
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert PreemptionSettings().end_time == float("inf")


def test_without_a_notice_training_ends_as_ever(tmp_path):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    threads = set(threading.enumerate())
    with CheckpointManager(tmp_path) as checkpoints:
        with Preemption(checkpoints, PreemptionSettings(**QUICK)) as preemption:
            assert not any(preemption.should_stop(step) for step in range(1, 11))
            assert not any(preemption.should_stop_evaluating() for _ in range(10))
            assert preemption.notices == ()
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
        assert set(threading.enumerate()) == threads
        assert checkpoints.steps() == []


def exit_at(checkpoints: CheckpointManager, step: int, act: Callable[[], object]) -> None:
    """Save and exit without a notice, after ``act``."""
    with Preemption(checkpoints) as preemption:
        act()
        with pytest.raises(SystemExit):
            preemption.save_and_exit(step, make_state())


def test_a_step_that_was_saved_is_not_saved_again(tmp_path, actions):
    with CheckpointManager(tmp_path) as checkpoints:
        exit_at(checkpoints, 5, lambda: checkpoints.save(5, make_state()).result())
        assert checkpoints.steps() == [5]
    assert actions == ["leave"]


def test_a_save_of_this_step_that_runs_is_waited_for(tmp_path, actions):
    is_planned = threading.Event()

    def hold(event: object) -> None:
        if isinstance(event, StepReached) and event.number == 3:
            assert is_planned.wait(60)

    class Pending(CheckpointManager):
        """Lets the save go on when the plan, which looks at it first, was made."""

        num_looks = 0

        @property
        def pending(self):
            self.num_looks += 1
            if self.num_looks > 1:
                is_planned.set()
            return super().pending

    unsubscribe = subscribe(hold)
    with Pending(tmp_path) as checkpoints:
        exit_at(checkpoints, 5, lambda: checkpoints.save(5, make_state()))
        assert checkpoints.steps() == [5]
    unsubscribe()
    assert actions == ["wait"]


def test_a_save_that_failed_before_is_not_in_the_way(tmp_path, actions):
    def fail() -> None:
        with small_files(1000):
            checkpoints.save(1, {"w": torch.zeros(50_000)}).wait()

    with CheckpointManager(tmp_path) as checkpoints:
        exit_at(checkpoints, 2, fail)
        assert checkpoints.steps() == [2]
    assert actions == ["save"]


def test_a_grace_period_that_is_over_leaves_the_previous_checkpoint(tmp_path, actions):
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, make_state()).result()
        _, code = leave(
            checkpoints,
            PreemptionSettings(signals={"SIGTERM": 0.0}, **QUICK),
            lambda: os.kill(os.getpid(), signal.SIGTERM),
        )
        assert (code, checkpoints.steps()) == (75, [1])
    assert actions == ["leave"]


def test_the_optimizer_is_left_out_only_if_that_is_allowed_and_resumes_if_so(tmp_path, actions):
    """As if a save had taken an hour; two thirds of the state are the optimizer's."""
    hour_s = 3600.0
    settings = PreemptionSettings(
        signals={"SIGTERM": hour_s}, when_short=WhenShort.LEAVE_OUT_OPTIMIZER, **QUICK
    )
    with CheckpointManager(tmp_path) as checkpoints:

        def hear() -> None:
            slow = {"url": checkpoints.url, "step": 0, "attempt": "a", "num_bytes": 1}
            emit(CheckpointCommitted(**slow, duration_s=hour_s))
            os.kill(os.getpid(), signal.SIGTERM)

        step, _ = leave(checkpoints, settings, hear)
    assert actions == ["save_without_optimizer"]
    with CheckpointManager(tmp_path) as again, pytest.raises(LoadRefused):
        again.resume(make_state())
    options = LoadOptions(overrides={"missing:optim*": Severity.WARN})
    with CheckpointManager(tmp_path, Settings(load=options)) as again:
        loaded = again.resume(make_state())
        assert loaded is not None
        assert loaded.step == step


def test_an_error_of_the_watcher_reaches_the_trainer(tmp_path):
    nonsense = Notice(object(), 1.0)  # cannot be told to other ranks
    with (
        CheckpointManager(tmp_path) as checkpoints,
        pytest.raises(TypeError, match="not JSON serializable"),
        Preemption(checkpoints, PreemptionSettings(sources=[lambda: nonsense], **QUICK)) as heard,
    ):
        train_until_stopped(heard)


ORPHAN = """
import os, signal, sys
from dcp_resume import CheckpointManager, Preemption, PreemptionSettings

ready, done = os.pipe()
if os.fork() == 0:
    settings = PreemptionSettings(signals={"SIGTERM": 0.01}, poll_s=0.01)
    with CheckpointManager(sys.argv[1]) as checkpoints, Preemption(checkpoints, settings):
        os.kill(os.getpid(), signal.SIGTERM)
        os.write(done, b"!")
        while True:
            signal.pause()  # a trainer that hangs
else:
    os.read(ready, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_orphan_whose_trainer_hangs_is_ended(tmp_path):
    """Nobody else is left to do it; a signal before shortens what it is given to end by itself."""
    result = subprocess.run(  # returns when all that hold its output have ended
        [sys.executable, "-c", ORPHAN, str(tmp_path)],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "none"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "reason='torchrun is gone'" in result.stderr
    assert "OrphanEnded(rank=0, exit_code=75)" in result.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("signals", {"SIGNOPE": 1.0}),
        ("signals", {"SIGKILL": 1.0}),
        ("poll_s", 0.0),
        ("sources_interval_s", -1.0),
        ("exit_after_s", float("nan")),
        ("lead_s", 0.0),
        ("margin", 0.5),
        ("exit_code", 0),
        ("exit_code", 200),
    ],
)
def test_settings_that_cannot_work(option, value):
    with pytest.raises(ConfigurationError) as raised:
        PreemptionSettings(**{option: value})
    assert raised.value.option == option


@pytest.mark.parametrize("option", ["save_optimizer_state", "load_optimizer_state"])
def test_an_optimizer_that_is_required_cannot_be_left_out(tmp_path, option):
    settings = Settings(**{option: OptimizerState.REQUIRED})
    with CheckpointManager(tmp_path, settings) as checkpoints:
        with pytest.raises(ConfigurationError) as raised:
            Preemption(checkpoints, PreemptionSettings(when_short=WhenShort.LEAVE_OUT_OPTIMIZER))
        assert raised.value.option == "when_short"
