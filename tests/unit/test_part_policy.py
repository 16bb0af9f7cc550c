"""Parts of an upload: their size by the measured rate, their number by memory, S3's limits."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.storage.concurrency import ByteBudget
from dcp_resume.storage.part_policy import (
    BUDGET_BYTES,
    FIRST_RATE,
    WHOLE_BYTES,
    PartPlan,
    PartRate,
    plan_parts,
)

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


@pytest.mark.parametrize(
    ("size", "rate", "expected"),
    [
        (GIB, FIRST_RATE, PartPlan(16 * MIB, 8)),
        (GIB, 10 * MIB, PartPlan(8 * MIB, 16)),  # slow requests: small, and many
        (GIB, 40 * MIB, PartPlan(10 * MIB, 12)),
        (GIB, 900 * MIB, PartPlan(32 * MIB, 4)),  # fast ones: large, and few
        (GIB, 1, PartPlan(8 * MIB, 16)),
        (20 * MIB, 900 * MIB, PartPlan(10 * MIB, 12)),  # two parts at least
        (TIB, FIRST_RATE, PartPlan(105 * MIB, 1)),  # 10,000 parts are not enough
        (5 * TIB, FIRST_RATE, PartPlan(525 * MIB, 1)),  # nor is the budget
    ],
)
def test_parts_follow_the_rate_within_limits(size: int, rate: int, expected: PartPlan) -> None:
    assert plan_parts(size, rate=rate) == expected


@given(
    size=st.integers(WHOLE_BYTES + 1, 40 * TIB),
    rate=st.integers(0, 100 * GIB),
    budget=st.integers(5 * MIB, 4 * GIB),
)
def test_no_plan_leaves_the_limits(size: int, rate: int, budget: int) -> None:
    plan = plan_parts(size, rate=rate, budget_bytes=budget)
    assert 5 * MIB <= plan.part_bytes <= 5 * GIB
    assert plan.part_bytes < size <= plan.part_bytes * 10_000
    assert plan.width >= 1
    assert plan.width * plan.part_bytes <= budget or plan.width == 1
    if plan.part_bytes > budget:
        assert size > 10_000 * (plan.part_bytes - MIB)


def test_an_object_beyond_s3_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 10000 parts"):
        plan_parts(50_000 * GIB + 1, rate=FIRST_RATE)


def test_the_rate_follows_what_is_measured_and_passes_over_small_parts() -> None:
    rate = PartRate()
    rate.note(MIB, 10**9)
    assert rate.bytes_per_s == FIRST_RATE
    for _ in range(30):
        rate.note(16 * MIB, 2 * 10**9)
    assert rate.bytes_per_s == pytest.approx(8 * MIB, rel=0.01)
    rate.note(16 * MIB, 0)  # a clock that stands still is no reason to fail
    assert plan_parts(GIB, rate=rate.bytes_per_s).part_bytes == 32 * MIB


def test_never_more_than_the_budget_is_taken_and_the_first_come_first() -> None:
    taken: list[int] = []
    order: list[int] = []

    async def use(budget: ByteBudget, number: int, amount: int) -> None:
        async with budget.taken(amount):
            order.append(number)
            taken.append(amount)
            assert sum(taken) <= 100 or taken == [amount]
            try:
                await asyncio.sleep(0)
            finally:
                taken.remove(amount)

    async def race() -> None:
        budget = ByteBudget(100)
        amounts = [60, 60, 30, 100, 10, 250, 10]
        cut_off = asyncio.create_task(use(budget, -1, 100))
        tasks = [asyncio.create_task(use(budget, n, a)) for n, a in enumerate(amounts)]
        queued = asyncio.create_task(use(budget, -2, 100))
        await asyncio.sleep(0)
        cut_off.cancel()  # while it has all
        queued.cancel()  # while it waits
        await asyncio.gather(*tasks, cut_off, queued, return_exceptions=True)
        async with budget.taken(100):  # everything came back
            pass

    asyncio.run(race())
    assert order == [-1, 0, 1, 2, 3, 4, 5, 6]
    assert not taken


def test_the_budget_holds_eight_first_parts() -> None:
    assert plan_parts(GIB, rate=FIRST_RATE).width == 8
    assert BUDGET_BYTES == 128 * MIB
