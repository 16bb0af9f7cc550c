"""Ranks that stop, stop at one boundary: any interleaving of steps, evaluations and notices."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_resume.errors import RankSilent
from dcp_resume.manager.stop_vote import Answer, StopVote

NUM_STEPS = 4
PASS, WATCH, NOTICE = "pass", "watch", "notice"


@dataclass
class Rank:
    """A trainer that evaluates after its second step, and the watcher beside it."""

    vote: StopVote
    num_batches: int
    has_eval_first: bool
    """Whether it evaluates before the boundary, or after it."""
    events: list[str] = field(default_factory=list)
    stopped_at: int | None = None
    is_done: bool = False

    def __post_init__(self) -> None:
        self._program = self._train()
        next(self._program)

    def _train(self):
        for step in range(1, NUM_STEPS + 1):
            yield
            if step == 2 and self.has_eval_first:
                yield from self._evaluate()
            while (answer := self.vote.try_boundary(step)) is Answer.WAIT:
                yield
            if answer is Answer.STOP:
                self.stopped_at = step
                break
            if step == 2 and not self.has_eval_first:
                yield from self._evaluate()
        self.is_done = True
        self.vote.leave()
        yield

    def _evaluate(self):
        for batch in range(self.num_batches):
            while (answer := self.vote.try_batch()) is Answer.WAIT:
                yield
            self.events.append(f"{batch} {answer.value}")
            if answer is Answer.STOP:
                return
            yield

    def advance(self) -> None:
        if not self.is_done:
            next(self._program)

    def watch(self, is_noticed: bool) -> None:
        """One tick of the watcher, which ends with its trainer."""
        if self.is_done:
            return
        if not self.vote.is_held and (is_noticed or self.vote.look()):
            self.vote.ask(b"notice", 60.0)
        if self.vote.is_held and not self.vote.is_settled:
            self.vote.settle()


def make_ranks(count: int, num_batches: list[int], has_eval_first: bool) -> list[Rank]:
    store = dist.HashStore()
    return [
        Rank(StopVote(store, "p", rank=r, world_size=count), num_batches[r], has_eval_first)
        for r in range(count)
    ]


@settings(max_examples=400, deadline=None)
@given(
    count=st.integers(1, 4),
    num_batches=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    has_eval_first=st.booleans(),
    moves=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([PASS, PASS, WATCH, NOTICE])), max_size=60
    ),
)
def test_ranks_stop_at_one_boundary_or_all_finish(count, num_batches, has_eval_first, moves):
    ranks = make_ranks(count, num_batches, has_eval_first)
    for number, move in moves:
        rank = ranks[number % count]
        if move == PASS:
            rank.advance()
        else:
            rank.watch(is_noticed=move == NOTICE)
    for _ in range(40):  # more than any program has points: nobody may be left waiting
        for rank in ranks:
            rank.advance()
            rank.watch(is_noticed=False)

    assert all(rank.is_done for rank in ranks)
    assert len({rank.stopped_at for rank in ranks}) == 1
    if has_eval_first and len(set(num_batches[:count])) == 1:
        assert len({tuple(rank.events) for rank in ranks}) == 1, "left at different batches"


def test_the_furthest_rank_says_where_and_those_behind_come_up_to_it():
    ranks = make_ranks(3, [0, 0, 0], has_eval_first=True)
    for _ in range(2):
        ranks[2].advance()  # has passed two boundaries, the others none
    ranks[0].watch(is_noticed=True)
    for _ in range(8):
        for rank in ranks:
            rank.watch(is_noticed=False)
            rank.advance()

    assert [rank.stopped_at for rank in ranks] == [3, 3, 3]


def test_a_notice_in_an_evaluation_before_the_boundary_stops_at_that_step():
    ranks = make_ranks(2, [3, 3], has_eval_first=True)
    for _ in range(2):
        for rank in ranks:
            rank.advance()  # one batch was evaluated
    assert [rank.events for rank in ranks] == [["0 go_on"]] * 2
    ranks[1].watch(is_noticed=True)
    for _ in range(4):
        for rank in ranks:
            rank.watch(is_noticed=False)
            rank.advance()

    assert [rank.events for rank in ranks] == [["0 go_on", "1 stop"]] * 2
    assert [rank.stopped_at for rank in ranks] == [2, 2]


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_has_finished_keeps_nobody_waiting(first):
    ranks = make_ranks(2, [0, 0], has_eval_first=True)
    for _ in range(NUM_STEPS):
        ranks[first].advance()
    assert ranks[first].is_done
    ranks[1 - first].watch(is_noticed=True)
    for _ in range(NUM_STEPS):
        ranks[1 - first].watch(is_noticed=False)
        ranks[1 - first].advance()

    assert [(rank.is_done, rank.stopped_at) for rank in ranks] == [(True, None)] * 2


@pytest.mark.parametrize(("silent", "asking"), [(1, 0), (0, 1)])
def test_a_silent_rank_is_named_by_those_that_wait(silent, asking):
    store = dist.HashStore()
    votes = [StopVote(store, "p", rank=rank, world_size=2) for rank in range(2)]
    assert votes[asking].try_boundary(7) is Answer.GO_ON
    votes[asking].ask(b"notice", 0.0)
    assert votes[asking].try_boundary(8) is Answer.WAIT
    votes[asking].settle()

    with pytest.raises(
        RankSilent, match=rf"after step 8: rank\(s\) {silent} did not say"
    ) as raised:
        votes[asking].pass_boundary(9)
    assert (raised.value.ranks, raised.value.step, raised.value.phase) == ((silent,), 8, "stop")


def test_what_the_coordinator_found_is_raised_on_every_rank():
    store = dist.HashStore()
    votes = [StopVote(store, "p", rank=rank, world_size=3) for rank in range(3)]
    for vote in votes[:2]:
        vote.ask(b"notice", 0.0)
    for vote in votes[:2]:
        vote.settle()

    for vote in votes[:2]:
        with pytest.raises(RankSilent) as raised:
            vote.pass_batch()
        assert raised.value.ranks == (2,)
