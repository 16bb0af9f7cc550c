"""Positions are integers, so that ten thousand ranks are as exact as one."""

from __future__ import annotations

import random

import pytest

from dcp_resume.data.position import Batching, BatchSplit, Position, Span, Tail, dividing_sizes
from dcp_resume.errors import ConfigurationError


def places_of(batching, position):
    """Every rank's spans of one micro batch, in rank order, joined where they touch."""
    joined: list[Span] = []
    for rank in range(batching.split.num_ranks):
        for span in batching.spans(position, rank):
            last = joined[-1] if joined else None
            if last and (last.epoch, last.stop) == (span.epoch, span.start):
                joined[-1] = last._replace(stop=span.stop)
            else:
                joined.append(span)
    return joined


def test_a_global_batch_that_the_ranks_cannot_share_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigurationError) as caught:
        BatchSplit(global_batch=100, micro_batch=8, num_ranks=3)
    assert "100 / (micro_batch 8 * 3 ranks = 24) leaves a remainder of 4" in str(caught.value)
    assert "96 or 120" in str(caught.value)
    assert caught.value.option == "global_batch"
    with pytest.raises(ConfigurationError, match="use a global_batch of 24, or"):
        BatchSplit(global_batch=5, micro_batch=8, num_ranks=3)


@pytest.mark.parametrize("name", ["global_batch", "micro_batch", "num_ranks"])
@pytest.mark.parametrize("value", [0, -4, 4.0, True, "4"])
def test_sizes_are_whole_numbers_from_one(name, value):
    with pytest.raises(ConfigurationError, match=name):
        BatchSplit(**{"global_batch": 4, "micro_batch": 4, "num_ranks": 1, name: value})


def test_a_split_says_its_product():
    split = BatchSplit(global_batch=64, micro_batch=4, num_ranks=8)
    assert split.accumulation == 2
    assert str(split) == "global batch 64 = micro batch 4 * 8 ranks * accumulation 2"


def test_an_epoch_without_a_whole_batch_is_refused_if_its_tail_is_dropped():
    split = BatchSplit(global_batch=64, micro_batch=64, num_ranks=1)
    with pytest.raises(ConfigurationError, match="an epoch of 63 samples has no batch of 64"):
        Batching(63, split, Tail.DROP)
    with pytest.raises(ConfigurationError, match="num_samples"):
        Batching(0, split)


def test_ten_thousand_ranks_take_each_place_once_across_an_epochs_end():
    num_samples = 10**12 + 39
    batching = Batching(num_samples, BatchSplit(40_000, 2, 10_000))
    position = Position(7, num_samples - 30_001, 123)
    assert places_of(batching, position) == [Span(7, num_samples - 30_001, num_samples - 10_001)]
    position = batching.after(position)
    assert position == Position(7, num_samples - 30_001, 123, 1)
    assert places_of(batching, position) == [
        Span(7, num_samples - 10_001, num_samples),
        Span(8, 0, 9_999),
    ]
    assert batching.after(position) == Position(8, 9_999, 40_123)


def test_the_micro_batches_of_a_step_are_the_same_on_any_number_of_ranks():
    wanted = Batching(1000, BatchSplit(240, 5, 1))
    for num_ranks in (2, 3, 4, 6, 8, 12, 16, 24, 48):
        batching = Batching(1000, BatchSplit(240, 5, num_ranks))
        position, single = Position(0, 888), Position(0, 888)
        for _ in range(batching.split.accumulation):
            for rank in range(num_ranks):
                assert batching.spans(position, rank) == wanted.spans(single, 0)
                single = wanted.after(single)
            position = batching.after(position)
        assert position == single == Position(1, 128, 240)


def test_a_batch_may_be_larger_than_the_dataset():
    batching = Batching(3, BatchSplit(10, 10, 1))
    assert batching.spans(Position(), 0) == [Span(0, 0, 3), Span(1, 0, 3), Span(2, 0, 3), (3, 0, 1)]
    assert batching.after(Position()) == Position(3, 1, 10)
    assert batching.remaining_micro_batches(Position()) == 1


@pytest.mark.parametrize("tail", Tail)
def test_the_micro_batches_that_remain_are_those_that_come(tail):
    source = random.Random(0)
    for _ in range(300):
        unit = source.randint(1, 9)
        split = BatchSplit(unit * source.randint(1, 4), unit, 1)
        batching = Batching(split.global_batch + source.randint(0, 50), split, tail)
        place = source.randrange(0, batching.num_samples, split.global_batch)
        position = batching.settled(Position(2, place, 1000))
        epoch, remaining = position.epoch, batching.remaining_micro_batches(position)
        while position.epoch == epoch:
            assert remaining == batching.remaining_micro_batches(position) > 0
            position, remaining = batching.after(position), remaining - 1
        assert remaining == 0


def test_a_dropped_tail_belongs_to_no_batch():
    batching = Batching(11, BatchSplit(4, 4, 1), Tail.DROP)
    assert batching.after(Position(0, 4, 4)) == Position(1, 0, 8)
    assert batching.settled(Position(0, 8, 8)) == Position(1, 0, 8)
    assert batching.settled(Position(0, 7, 8)) == Position(0, 7, 8)


def test_sizes_that_divide_are_the_nearest_ones():
    for consumed in range(1, 200):
        for unit in (1, 2, 3, 8):
            for near in (1, 5, 24, 199):
                fitting = [size for size in range(unit, consumed + 1, unit) if consumed % size == 0]
                below = [size for size in fitting if size < near][-1:]
                above = [size for size in fitting if size > near][:1]
                assert dividing_sizes(consumed, unit, near) == below + above
