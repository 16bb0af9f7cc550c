"""States of the simulated store and its actors, the invariants, and the exhaustive search."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dcp_resume.errors import DcpResumeError
from dcp_resume.manager.policies import KeepLast, decide
from dcp_resume.manifest.history import RunHistory
from dcp_resume.manifest.keys import parse_log_key
from dcp_resume.manifest.records import CommitRecord, LogRecord, OpenRecord, RetireRecord
from dcp_resume.manifest.wire import decode_record

from .programs import catalog_key
from .scripted import Answer, Node, Program, Question, perform

POLICY = KeepLast(2)
"""Of every ``policy_pruner`` of the searches."""

Put = tuple[str, bytes]
Acks = frozenset[tuple[int, int, int]]
_decode = functools.lru_cache(maxsize=100_000)(decode_record)


@dataclass(eq=False)
class Shelf:
    """What lies on the store, and what was deleted from it. Equal contents are one object."""

    objects: dict[str, bytes]
    deleted: dict[str, bytes]
    table: dict[object, Shelf] = field(repr=False)
    _after: dict[Question, tuple[Shelf, Answer]] = field(default_factory=dict, repr=False)
    _checked: dict[Acks, list[str]] = field(default_factory=dict, repr=False)

    def after(self, question: Question) -> tuple[Shelf, Answer]:
        if question not in self._after:
            objects = dict(self.objects)
            answer = perform(question, objects)
            gone = self.objects.keys() - objects.keys()
            deleted = self.deleted | {key: self.objects[key] for key in gone}
            identity = (frozenset(objects.items()), frozenset(deleted.items()))
            shelf = self.table.setdefault(identity, Shelf(objects, deleted, self.table))
            self._after[question] = (shelf, answer)
        return self._after[question]

    def violations(self, acks: Acks) -> list[str]:
        if acks not in self._checked:
            self._checked[acks] = list(_violations(self, acks))
        return self._checked[acks]

    def log(self) -> list[tuple[int, LogRecord]]:
        numbers = {parse_log_key(key): key for key in self.objects}
        numbers.pop(None, None)
        return [(n, _decode(self.objects[key], key)) for n, key in sorted(numbers.items())]


def new_shelf(objects: Mapping[str, bytes]) -> Shelf:
    return Shelf(dict(objects), {}, {})


def _violations(shelf: Shelf, acks: Acks) -> Iterator[str]:
    records = shelf.log()
    histories = [RunHistory()]
    try:
        for seq, record in records:
            histories.append(histories[-1].apply(seq, record))
    except DcpResumeError as error:
        yield f"the log contradicts itself: {error}"
        return
    yield from _broken_log(records)
    for seq, commit in histories[-1].live_commits().items():
        key = catalog_key(commit)
        needed = json.loads(shelf.objects.get(key) or shelf.deleted.get(key) or f'["{key}"]')
        missing = [name for name in needed if name not in shelf.objects]
        if missing:
            yield f"a committed checkpoint lost files: {seq} needs {missing}"
    yield from _lost_source(histories[-1])
    yield from _against_policy(records, histories)
    yield from _forgotten(records, histories, acks)


def _broken_log(records: Sequence[tuple[int, LogRecord]]) -> Iterator[str]:
    steps, highest = set(), 0
    for seq, record in records:
        if isinstance(record, OpenRecord):
            highest = max(highest, record.generation)
        if not isinstance(record, CommitRecord):
            continue
        if record.generation < highest:
            yield f"a fenced generation committed: {seq} of generation {record.generation}"
        if (record.generation, record.step) in steps:
            yield f"a step was committed twice: {record.step} of generation {record.generation}"
        steps.add((record.generation, record.step))


def _against_policy(
    records: Sequence[tuple[int, LogRecord]], histories: Sequence[RunHistory]
) -> Iterator[str]:
    for seq, record in records:
        if isinstance(record, RetireRecord) and record.reason == f"retention: {POLICY}":
            decisions = decide(histories[seq - 1], POLICY)
            reasons = [one.reason for one in decisions if one.entry.seq == record.target]
            if any(reasons):
                yield f"a retire against the policy: {record.target} at {seq} is {reasons}"


def _lost_source(history: RunHistory) -> Iterator[str]:
    source = history.sources.get(history.generation)
    if source in history.retired:
        yield f"the live resume source was retired: {source}"
    owner = max(history.opens.values(), key=lambda record: record.generation)
    may_be_empty = history.quarantined or owner.incarnation.startswith("rollback")
    if history.commits and history.newest() is None and not may_be_empty:
        yield f"nothing is left to resume from: all of {list(history.commits)} are retired"


def _forgotten(
    records: Sequence[tuple[int, LogRecord]], histories: Sequence[RunHistory], acks: Acks
) -> Iterator[str]:
    for seq, generation, step in acks:
        found = histories[-1].commits.get(seq)
        if found is None or (found.generation, found.step) != (generation, step):
            yield f"an acknowledged commit is not in the log: step {step} at {seq}"
    for seq, record in records:
        if not isinstance(record, OpenRecord) or record.incarnation.startswith("rollback"):
            continue
        before, after = histories[seq - 1].lineage(), histories[seq].lineage()
        if [entry.seq for entry in before] != [entry.seq for entry in after]:
            yield f"an open forgot commits: {seq} resumed from {record.resume_source}"


@dataclass(frozen=True)
class State:
    """Where every actor stands, what lies on the store, and what is still in the network."""

    shelf: Shelf
    actors: tuple[Node, ...]
    crashed: frozenset[int] = frozenset()
    in_flight: frozenset[Put] = frozenset()

    def acknowledged(self) -> Acks:
        return frozenset().union(*(node.acknowledged for node in self.actors))

    def question(self, actor: int) -> Question | None:
        """What an actor waits for; None if it ended or crashed."""
        if actor in self.crashed:
            return None
        asked = self.actors[actor].next()
        return asked if isinstance(asked, Question) else None

    def answer(self, actor: int, shelf: Shelf, answer: Answer) -> State:
        nodes = list(self.actors)
        nodes[actor] = nodes[actor].answered(answer)
        nodes[actor].next()
        return State(shelf, tuple(nodes), self.crashed, self.in_flight)

    def step(self, actor: int, question: Question) -> State:
        """The store carries the actor's question out and answers."""
        return self.answer(actor, *self.shelf.after(question))

    def crash(self, actor: int, put: Put | None = None) -> State:
        """The actor dies; its last request may still be under way."""
        in_flight = self.in_flight | ({put} if put else frozenset())
        return State(self.shelf, self.actors, self.crashed | {actor}, in_flight)

    def land(self, put: Put) -> State:
        """A request that was under way arrives; nobody hears the answer."""
        shelf, _ = self.shelf.after(Question("create", *put))
        return State(shelf, self.actors, self.crashed, self.in_flight - {put})


def start(objects: Mapping[str, bytes], programs: Iterable[Program]) -> State:
    state = State(new_shelf(objects), tuple(Node(program, objects) for program in programs))
    for node in state.actors:
        node.next()
    return state


@dataclass
class Search:
    """Outcome of an exhaustive search."""

    num_states: int
    bad: dict[str, list[str]]
    """Kind of violation → the first schedule that was found to lead there."""
    ends: set[str]
    """How actors ended, over all schedules."""


def explore(
    initial: State,
    *,
    may_crash: frozenset[int] = frozenset(),
    may_lose: frozenset[int] = frozenset(),
    is_enough: bool = False,
) -> Search:
    """Visit every reachable state.

    Args:
        initial: First state.
        may_crash: Actors that may die with an exclusive create in flight.
        may_lose: Actors that may lose the answer to an exclusive create.
        is_enough: Stop at the first bad state.
    """
    came_from: dict[State, tuple[State, str] | None] = {initial: None}
    found = Search(0, {}, set())
    stack = [initial]
    while stack:
        state = stack.pop()
        found.num_states += 1
        for violation in state.shelf.violations(state.acknowledged()):
            found.bad.setdefault(violation.partition(":")[0], [*_path(came_from, state), violation])
        if found.bad and is_enough:
            break
        for label, after in _moves(state, may_crash, may_lose):
            if after not in came_from:
                came_from[after] = (state, label)
                stack.append(after)
        for node in state.actors:
            error = getattr(node.next(), "error", None)
            if error is not None:
                found.ends.add(type(error).__name__)
    return found


def _moves(
    state: State, may_crash: frozenset[int], may_lose: frozenset[int]
) -> Iterator[tuple[str, State]]:
    for actor in range(len(state.actors)):
        question = state.question(actor)
        if question is None:
            continue
        label = f"{actor}: {question.verb} {question.key}"
        yield label, state.step(actor, question)
        if question.verb != "create":
            continue
        put = (question.key, question.data)
        if actor in may_crash:
            yield f"{label}, dies with it in flight", state.crash(actor, put)
        if actor in may_lose:
            yield f"{label}, answer lost", lose(state, actor, question, "landed")
            yield f"{label}, answer lost, in flight", lose(state, actor, question, "flying")
    for put in state.in_flight:
        yield f"lands: {put[0]}", state.land(put)


def lose(state: State, actor: int, question: Question, fate: str) -> State:
    """The answer to a create is lost; the request ``landed``, is ``flying``, or was ``dropped``."""
    shelf, in_flight = state.shelf, state.in_flight
    if fate == "landed":
        shelf, _ = shelf.after(question)
    elif fate == "flying":
        in_flight |= {(question.key, question.data)}
    after = state.answer(actor, shelf, ("raise", "OutcomeUnknown"))
    return State(shelf, after.actors, after.crashed, in_flight)


def _path(came_from: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    labels: list[str] = []
    step = came_from[state]
    while step is not None:
        labels.append(step[1])
        step = came_from[step[0]]
    return labels[::-1]
