"""A notice to any rank stops all ranks at one step, which they save."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dcp_resume import CheckpointManager, Notice, Preemption, PreemptionSettings, Settings
from dcp_resume.errors import RankSilent

pytestmark = pytest.mark.ranks

FAR = 100_000
"""More steps than any of these ranks will train."""
HANDLED = (signal.SIGTERM, signal.SIGUSR1)


def lockstep(step: int) -> None:
    """A step with a collective: ranks are one step apart at most."""
    dist.all_reduce(torch.tensor(step))


def notice_to_self(at: int, ranks: tuple[int, ...], step: int) -> None:
    """A step in which a signal comes to some ranks."""
    lockstep(step)
    if step == at and dist.get_rank() in ranks:
        os.kill(os.getpid(), signal.SIGTERM)


def run_job(
    root: str,
    train: Callable[[int], object],
    *,
    last: int = FAR,
    settings: PreemptionSettings | None = None,
    evaluate: Callable[[Preemption], object] = lambda preemption: None,
    deadline_s: float = 60.0,
) -> tuple[int | None, int, list[int]]:
    """A job of its own: exit code (None if it trained to the end), last step, checkpoints."""
    code, step = None, 0
    options = settings or PreemptionSettings(poll_s=0.05)
    with CheckpointManager(root, Settings(deadline_s=deadline_s)) as checkpoints:
        try:
            with Preemption(checkpoints, options) as preemption:
                for step in range(1, last + 1):
                    train(step)
                    evaluate(preemption)
                    if preemption.should_stop(step):
                        own = {f"w{dist.get_rank()}": torch.full((8,), float(step))}
                        preemption.save_and_exit(step, {"model": own})
        except SystemExit as left:
            code = left.code
        finally:
            for number in HANDLED:  # the rank serves other tests
                signal.signal(number, signal.SIG_DFL)
        return code, step, checkpoints.steps()


def assert_saved_alike(found: list[Any]) -> int:
    """All left with the exit code, at one step, which was saved; returns it."""
    step = found[0][1]
    assert found == [(75, step, [step])] * len(found)
    return step


def stop_by_signals_and_sources(root: str) -> list[Any]:
    rank = dist.get_rank()

    def with_source() -> PreemptionSettings:
        sources = [lambda: Notice("spot", 120.0)] if rank == 2 else []
        return PreemptionSettings(poll_s=0.05, sources=sources)

    return [
        run_job(f"{root}/one", partial(notice_to_self, 5, (1,))),
        run_job(f"{root}/all", partial(notice_to_self, 5, (0, 1, 2))),
        run_job(f"{root}/two", partial(notice_to_self, 3, (0, 2))),
        run_job(f"{root}/source", lockstep, settings=with_source()),
    ]


def test_a_notice_to_some_ranks_stops_all_at_one_step(ranks, tmp_path):
    for found, at in zip(
        zip(*ranks.run(stop_by_signals_and_sources, 3, str(tmp_path)), strict=True),
        (5, 5, 3, 1),
        strict=True,
    ):
        assert assert_saved_alike(list(found)) >= at


def run_apart(root: str) -> Any:
    """Ranks 0 and 1 train without a word to each other, rank 1 some steps behind."""
    rank = dist.get_rank()

    def train(step: int) -> None:
        if step == 4 and rank == 0:
            dist.send(torch.tensor(step), 1)  # has passed three boundaries
        elif step == 1 and rank == 1:
            dist.recv(torch.tensor(0), 0)
            os.kill(os.getpid(), signal.SIGUSR1)
        else:
            time.sleep(0.001)

    return run_job(root, train)


def test_ranks_that_are_steps_apart_meet(ranks, tmp_path):
    assert assert_saved_alike(ranks.run(run_apart, 2, str(tmp_path))) >= 4


def hear_in_long_steps(root: str) -> Any:
    """Rank 1 waits inside a collective until rank 0 has heard of the signal that rank 1 got."""
    rank, heard_step, codes = dist.get_rank(), 3, []
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())

    def in_step(preemption: Preemption) -> None:
        lockstep(0)
        codes.append(0)
        if len(codes) != heard_step:
            return
        if rank == 0:
            os.kill(pids[1], signal.SIGTERM)
            while not preemption.notices:
                time.sleep(0.01)
            dist.send(torch.zeros(1), 1)
        else:
            dist.recv(torch.zeros(1), 0)

    return run_job(root, lockstep, evaluate=in_step)


def test_a_signal_is_heard_while_the_rank_is_inside_a_collective(ranks, tmp_path):
    """And so the job stops in the same step, not in the next one."""
    assert assert_saved_alike(ranks.run(hear_in_long_steps, 2, str(tmp_path))) == 3


def hear_in_evaluation(root: str) -> Any:
    rank, batches = dist.get_rank(), []

    def evaluate(preemption: Preemption) -> None:
        if preemption.notices or len(batches):
            return
        for batch in range(FAR):  # the signal ends it
            if preemption.should_stop_evaluating():
                return
            lockstep(batch)
            batches.append(batch)
            if batch == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    result = run_job(root, lockstep, evaluate=evaluate)
    return result, len(batches)


def test_a_notice_in_an_evaluation_saves_the_step_it_follows(ranks, tmp_path):
    found = ranks.run(hear_in_evaluation, 3, str(tmp_path))

    assert assert_saved_alike([result for result, _ in found]) == 1
    assert len({num_batches for _, num_batches in found}) == 1, "left at different batches"


def finish_while_another_hears(root: str, finished: int) -> Any:
    """One rank ends its training and leaves; then the other, in its last step, gets a signal."""
    is_first, num_steps = dist.get_rank() == finished, 0

    def in_step(preemption: Preemption) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3 and not is_first:
            dist.recv(torch.zeros(1), finished)
            os.kill(os.getpid(), signal.SIGTERM)
            while not preemption.notices:
                time.sleep(0.01)

    result = run_job(root, lambda step: None, last=3, evaluate=in_step)
    if is_first:
        dist.send(torch.zeros(1), 1 - finished)
    return result


@pytest.mark.parametrize("finished", [0, 1])
def test_a_rank_that_has_finished_does_not_hang_the_others(ranks, tmp_path, finished):
    found = ranks.run(finish_while_another_hears, 2, str(tmp_path), finished)

    assert found == [(None, 3, [])] * 2


def die_before_a_notice(root: str) -> Any:
    if dist.get_rank() == 2:
        with CheckpointManager(root) as checkpoints, Preemption(checkpoints):
            os.kill(os.getpid(), signal.SIGKILL)
    settings = PreemptionSettings(poll_s=0.05, signals={"SIGTERM": 2.0})
    try:
        run_job(root, lambda step: hear_once(step), settings=settings, deadline_s=2.0)
    except RankSilent as error:
        return error.ranks, error.phase
    return None


def hear_once(step: int) -> None:
    """Train alone; a signal comes to rank 0."""
    if step == 2 and dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.001)


def test_a_dead_rank_is_named_and_nobody_waits_for_ever(ranks, tmp_path):
    outcomes = ranks.outcomes(die_before_a_notice, 3, str(tmp_path))

    assert [outcome.value for outcome in outcomes[:2]] == [((2,), "stop")] * 2
