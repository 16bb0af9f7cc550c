"""The retry loop, without any store and without waiting: clock and sleep are the test's."""

from __future__ import annotations

import asyncio
import random

import pytest

from dcp_resume.errors import ConfigurationError, OutcomeUnknown, StorageUnavailable
from dcp_resume.events import StorageRetried, subscribe
from dcp_resume.storage.retry import Operation, RetryPolicy, TransientFault

OPERATION = Operation("create", "s3://b/p", "k")
EXCLUSIVE = Operation("create", "s3://b/p", "k", exclusive=True)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, delay_s: float) -> None:
        self.slept.append(delay_s)
        self.now_s += delay_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events():
    seen: list[StorageRetried] = []
    unsubscribe = subscribe(seen.append)
    yield seen
    unsubscribe()


def policy(clock: Clock, **options) -> RetryPolicy:
    options = {"uniform": lambda _low, high: high, **options}
    return RetryPolicy(clock=clock, sleep=clock.sleep, **options)


def failing(*faults: Exception):
    """An attempt that raises one after another, and then returns how often it was called."""
    left = list(faults)

    def attempt() -> int:
        if left:
            raise left.pop(0)
        return len(faults) + 1

    return attempt


def test_success_waits_for_nothing(clock, events):
    assert policy(clock).run(OPERATION, failing()) == 1
    assert clock.slept == events == []


def test_transient_faults_are_retried_with_doubling_delays(clock, events):
    faults = [TransientFault(f"fault {number}") for number in range(8)]
    assert policy(clock).run(OPERATION, failing(*faults)) == 9
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])
    assert events[2] == StorageRetried(key="k", attempt=3, delay_s=0.4, reason="fault 2")
    assert len(events) == 8


def test_other_errors_are_not_retried(clock):
    with pytest.raises(ZeroDivisionError):
        policy(clock).run(OPERATION, failing(ZeroDivisionError()))
    assert clock.slept == []


def test_deadline_ends_it(clock):
    faults = [TransientFault("503 SlowDown", ambiguous=True)] * 1000
    with pytest.raises(StorageUnavailable, match=r"'k' at s3://b/p.*503 SlowDown") as caught:
        policy(clock, deadline_s=30).run(OPERATION, failing(*faults))
    assert clock.now_s - 1000.0 < 30
    assert caught.value.attempts == len(clock.slept) + 1


@pytest.mark.parametrize(
    ("ambiguous", "kind"),
    [([False, False], StorageUnavailable), ([True, False], OutcomeUnknown)],
)
def test_an_exclusive_create_remembers_ambiguity(clock, ambiguous, kind):
    faults = [TransientFault("x", ambiguous=one) for one in ambiguous]
    with pytest.raises(kind):
        policy(clock, deadline_s=0.2).run(EXCLUSIVE, failing(*faults))


def test_delays_are_spread_from_zero_to_the_cap():
    retry = RetryPolicy(uniform=random.Random(0).uniform)
    for attempt, cap in ((1, 0.1), (3, 0.4), (7, 5.0), (10_000, 5.0)):
        drawn = [retry.delay_s(attempt) for _ in range(500)]
        assert 0 <= min(drawn) < cap / 10
        assert cap * 0.9 < max(drawn) <= cap


@pytest.mark.parametrize(
    "options", [{"deadline_s": 0}, {"first_delay_s": -1}, {"first_delay_s": 6}, {"max_delay_s": 0}]
)
def test_impossible_policies_are_refused(options):
    with pytest.raises(ConfigurationError):
        RetryPolicy(**options)


def test_async_retries_and_ends_a_hanging_try_at_the_deadline(events):
    retry = RetryPolicy(deadline_s=0.2, first_delay_s=0.0, max_delay_s=0.0)
    cancelled = []

    async def hanging() -> None:
        if not events:
            raise TransientFault("first")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    with pytest.raises(OutcomeUnknown):
        asyncio.run(retry.run_async(EXCLUSIVE, hanging))
    assert cancelled == [True]
    assert [event.reason for event in events] == ["first"]


@pytest.mark.parametrize(
    ("was_sent", "kind"), [(True, OutcomeUnknown), (False, StorageUnavailable)]
)
def test_a_try_that_was_cut_off_before_it_was_sent_did_nothing(was_sent, kind):
    retry = RetryPolicy(deadline_s=0.05)
    with pytest.raises(kind, match="no answer in time"):
        asyncio.run(
            retry.run_async(EXCLUSIVE, lambda: asyncio.sleep(60), was_sent=lambda: was_sent)
        )
