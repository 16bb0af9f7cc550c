"""Run a program over a store whose answers are given in advance, up to its next question.

A program (a trainer, a pruner) is ordinary code that calls the store. It is deterministic, so what
it asks next depends on nothing but the answers so far. An ``Actor`` therefore is a tree: a node is
a sequence of answers, and knows the question that follows; each node runs the real code once,
whatever the number of schedules that pass through it. No threads, no tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dcp_resume import errors
from dcp_resume.storage.object_store import ObjectInfo

URL = "sim://run"

Key = str
Answer = tuple[str, object]
"""``("value", what the call returns)`` or ``("raise", name of the StorageError)``."""

DONE: Answer = ("value", None)


@dataclass(frozen=True)
class Question:
    """One call of the store that waits for its answer."""

    verb: str
    key: Key
    data: bytes = b""


@dataclass(frozen=True)
class Ended:
    """The program returned or raised."""

    value: object = None
    error: BaseException | None = None


class _Asked(BaseException):
    """Unwinds the program at its first unanswered question."""

    def __init__(self, question: Question) -> None:
        self.question = question


class ScriptedStore:
    """Answers from ``objects`` while the program sets up, then from the script."""

    url = URL

    def __init__(self, objects: Mapping[Key, bytes], script: Sequence[Answer]) -> None:
        self._objects = objects
        self._script = iter(script)
        self._is_live = False
        self.acknowledged: list[tuple[int, int, int]] = []
        """What the program told its user: (log number, generation, step) of commits."""

    def go_live(self) -> None:
        """What the program did so far happened before the simulation begins."""
        self._is_live = True

    def create(self, key: Key, data: bytes) -> None:
        self._ask(Question("create", key, bytes(data)))

    def write(self, key: Key, buffers: Sequence[memoryview]) -> int:
        data = b"".join(buffers)
        self._ask(Question("write", key, data))
        return len(data)

    def read(self, key: Key, *, max_bytes: int) -> bytes:
        data = self._ask(Question("read", key))
        assert isinstance(data, bytes)
        assert len(data) <= max_bytes
        return data

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        keys = self._ask(Question("list", prefix))
        assert isinstance(keys, tuple)
        return iter([ObjectInfo(key, 1, 0.0) for key in keys if key > start_after])

    def delete(self, keys: Iterable[Key]) -> None:
        for key in sorted(keys):
            self._ask(Question("delete", key))

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(())  # writes are whole or nothing here

    def discard(self, unfinished: Iterable[ObjectInfo]) -> None:
        assert not list(unfinished)

    def _ask(self, question: Question) -> object:
        if self._is_live:
            kind, value = next(self._script, (None, None))
        else:
            kind, value = perform(question, dict(self._objects))
        if kind is None:
            raise _Asked(question)
        if kind == "raise":
            raise getattr(errors, str(value))(f"simulated {value}", url=URL, key=question.key)
        return value


def perform(question: Question, objects: dict[Key, bytes]) -> Answer:
    """Carry a question out on ``objects``, in place, and answer it."""
    key = question.key
    if question.verb == "list":
        return "value", tuple(sorted(name for name in objects if name.startswith(key)))
    if question.verb == "read":
        return ("value", objects[key]) if key in objects else ("raise", "KeyNotFound")
    if question.verb == "create" and key in objects:
        return "raise", "KeyExists"
    if question.verb == "delete":
        objects.pop(key, None)
    else:
        objects[key] = question.data
    return DONE


Program = Callable[[ScriptedStore], object]


@dataclass(eq=False)
class Node:
    """A program after a sequence of answers. Nodes are compared by identity."""

    program: Program
    objects: Mapping[Key, bytes]
    script: tuple[Answer, ...] = ()
    _children: dict[Answer, Node] = field(default_factory=dict)
    _next: Question | Ended | None = None
    acknowledged: frozenset[tuple[int, int, int]] = frozenset()

    def next(self) -> Question | Ended:
        """What the program does after the answers so far."""
        if self._next is None:
            store = ScriptedStore(self.objects, self.script)
            try:
                self._next = Ended(value=self.program(store))
            except _Asked as asked:
                self._next = asked.question
            except Exception as error:
                self._next = Ended(error=error)
            self.acknowledged = frozenset(store.acknowledged)
        return self._next

    def answered(self, answer: Answer) -> Node:
        """The program after one more answer."""
        child = self._children.get(answer)
        if child is None:
            child = Node(self.program, self.objects, (*self.script, answer))
            self._children[answer] = child
        return child
