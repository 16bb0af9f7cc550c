"""Compare what two checkpoints hold, whatever topology wrote either of them.

1. Names. Each tensor and value is looked for on the other side, also under names tied to its own;
   dtypes and shapes without padding must agree.
2. Values. As they are stored; those of a rank with the same rank's.
3. Tensors. Byte by byte over their logical part, in windows (``session.tensor_difference``).
4. Facts. What the manifests say of trainer, model, optimizer, data and precision.

Where a checkpoint lies, who wrote it, when, and on which ranks is no content, and not compared.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.flattening import part_of
from dcp_resume.planning.padding import logical_shape
from dcp_resume.session.side import Side, Values
from dcp_resume.session.tensor_difference import Pair, TensorComparer, TensorDifference
from dcp_resume.session.value_difference import ValueDifference, compare_values
from dcp_resume.session.windows import check_window

__all__ = [
    "EXPECTED",
    "CheckpointDifference",
    "DiffOptions",
    "PartDifference",
    "compare_checkpoints",
]


EXPECTED = ("wall_time_s", "lineage")
"""Fields of the trainer state that two runs of the same training may differ in: seconds that it
took, and where it went on from. ``<part>.<field>`` of a value, and the manifest's copy."""

_FACTS = ("trainer", "model", "optimizer", "data", "precision")


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """How to compare.

    Raises:
        ConfigurationError: The window is too small.
    """

    ignored: tuple[str, ...] = ()
    """FQNs that may differ, beside ``EXPECTED``; patterns as in ``fnmatch``."""
    window_bytes: int = 64 * 1024 * 1024
    """Bytes in transit on each side; readers need some more beside them."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with bytes of tensors compared and in all, of one side."""

    def __post_init__(self) -> None:
        check_window(self.window_bytes)


@dataclass(frozen=True, slots=True)
class PartDifference:
    """How one part of the state compares."""

    name: str
    num_tensors: int
    num_values: int
    differences: tuple[str, ...]
    """Its tensors and values that differ or are on one side only, a sentence each."""


@dataclass(frozen=True, slots=True)
class CheckpointDifference:
    """Everything in which two checkpoints differ."""

    step_a: int
    step_b: int
    names: tuple[Problem, ...]
    """What is on one side only (``missing`` in B, ``extra`` in B), or of another ``kind``,
    ``dtype`` or ``shape``."""
    values: tuple[ValueDifference, ...]
    tensors: tuple[TensorDifference, ...]
    facts: tuple[Problem, ...]
    passed_over: tuple[str, ...]
    """Names that were not looked at, because they may differ: of ``EXPECTED``, and those that the
    caller ignores."""
    uncompared: tuple[Problem, ...]
    """What cannot be compared: values of ranks, where the numbers of ranks differ."""
    parts: tuple[PartDifference, ...]
    num_tensors: int
    """Compared; tied names count once."""
    num_values: int
    """Compared; those of each rank count."""
    num_bytes: int
    """Of the tensors compared, on one side."""
    digest_bytes: int
    """Of these, bytes that digests alone proved equal."""
    duration_s: float

    @property
    def is_equal(self) -> bool:
        """Whether everything that was compared is equal."""
        return not (self.names or self.values or self.tensors or self.facts)

    def lines(self) -> Iterator[str]:
        """Each difference as a sentence: causes before what follows from them."""
        for item in (*self.names, *self.values, *self.tensors, *self.facts):
            yield str(item)


def compare_checkpoints(
    a: Side, b: Side, options: DiffOptions = DiffOptions()
) -> CheckpointDifference:
    """Compare the logical contents of two checkpoints.

    Args:
        a: The one; its names and its order count.
        b: The other.
        options: What may differ, memory, progress.

    Raises:
        CorruptData: A block of either side is damaged.
        InvalidDocument: The packed values of either side are malformed.
        StorageError: A store failed.
    """
    started = time.monotonic()
    found = _Comparison(a, b, options)
    pairs = found.pair_tensors()
    found.compare_shared_values()
    found.compare_rank_values()
    total = sum(_num_bytes(a.opened.entry(pair.fqn)) for pair in pairs)
    comparer = TensorComparer(
        a, b, options.window_bytes, lambda done: options.progress(done, total)
    )
    tensors = comparer.compare(pairs)
    return CheckpointDifference(
        step_a=a.opened.manifest.step,
        step_b=b.opened.manifest.step,
        names=tuple(found.names),
        values=tuple(found.sorted_values()),
        tensors=tuple(tensors),
        facts=tuple(found.facts()),
        passed_over=tuple(dict.fromkeys(found.passed_over)),
        uncompared=tuple(found.uncompared),
        parts=tuple(found.parts(pairs, tensors)),
        num_tensors=len(pairs),
        num_values=found.num_values.total(),
        num_bytes=comparer.num_bytes,
        digest_bytes=comparer.digest_bytes,
        duration_s=time.monotonic() - started,
    )


def _num_bytes(entry: TensorEntry) -> int:
    return math.prod(logical_shape(entry)) * ITEMSIZES[entry.dtype]


class _Comparison:
    """What is known so far of how two checkpoints differ."""

    def __init__(self, a: Side, b: Side, options: DiffOptions) -> None:
        self._a, self._b, self._options = a, b, options
        self.names: list[Problem] = []
        self.values: list[ValueDifference] = []
        self.uncompared: list[Problem] = []
        self.passed_over: list[str] = []
        self.num_values: Counter[str] = Counter()
        self._parts_of_names: list[str] = []
        self._trainer_parts: set[object] = set()

    def pair_tensors(self) -> list[Pair]:
        """The tensors that both sides hold with one dtype and shape; each memory once."""
        a, b = self._a, self._b
        pairs: dict[tuple[int, int], Pair] = {}
        met: set[int] = set()
        for fqn, entry in a.tensors.items():
            if self._passes_over(fqn, entry.path):
                continue
            other = self._name_in(fqn, b.tensors)
            if other is None:
                self._note(fqn, entry.part, "missing", "A holds it as a tensor, B does not")
                continue
            ids = a.opened.tensor_ids[fqn], b.opened.tensor_ids[other]
            met.add(ids[1])
            if ids not in pairs and self._fits(fqn, other):
                pairs[ids] = Pair(fqn, other)
        for fqn, entry in b.tensors.items():
            if b.opened.tensor_ids[fqn] not in met and not self._passes_over(fqn, entry.path):
                self._note(fqn, entry.part, "extra", "B holds it as a tensor, A does not")
        return list(pairs.values())

    def _fits(self, fqn: str, other: str) -> bool:
        a, b = self._a.opened.entry(fqn), self._b.opened.entry(other)
        if (a.kind == "per_rank") != (b.kind == "per_rank"):
            self._note(fqn, a.part, "kind", f"A holds it as {a.kind}, B as {b.kind}")
        elif a.dtype != b.dtype:
            self._note(fqn, a.part, "dtype", f"A holds {a.dtype}, B {b.dtype}")
        elif a.kind == "per_rank" and self._a.world_size != self._b.world_size:
            self._cannot_compare(fqn)
        elif logical_shape(a) != logical_shape(b):
            message = f"A has shape {logical_shape(a)}, B {logical_shape(b)}"
            self._note(fqn, a.part, "shape", message)
        else:
            return True
        return False

    def compare_shared_values(self) -> None:
        """The values that all ranks share."""
        found = self._compare_values(self._a.shared_values, self._b.shared_values, "")
        self.values += found

    def compare_rank_values(self) -> None:
        """The values of each rank's own, if the numbers of ranks are equal."""
        a, b = self._a, self._b
        if a.world_size != b.world_size:
            for part in dict.fromkeys((*a.per_rank_parts, *b.per_rank_parts)):
                self._cannot_compare(part)
            return
        found: dict[str, ValueDifference] = {}
        for rank in range(a.world_size):
            for item in self._compare_values(
                a.values_of(rank), b.values_of(rank), f"'s rank {rank}"
            ):
                first = found.setdefault(item.fqn, item)
                found[item.fqn] = replace(first, ranks=(*first.ranks, rank))
        self.values += found.values()

    def _compare_values(self, a: Values, b: Values, whose: str) -> Iterator[ValueDifference]:
        for fqn, (path, value) in a.items():
            if self._passes_over(fqn, path):
                continue
            part = part_of(tuple(path))
            other = self._name_in(fqn, b)
            if other is None:
                self._note(fqn, part, "missing", f"A{whose} holds it as a value, B{whose} does not")
                continue
            self.num_values[part] += 1
            difference = compare_values(fqn, part, value, b[other][1])
            if difference is not None:
                yield difference
        for fqn, (path, _) in b.items():
            if not self._passes_over(fqn, path) and self._name_in(fqn, a) is None:
                message = f"B{whose} holds it as a value, A{whose} does not"
                self._note(fqn, part_of(tuple(path)), "extra", message)

    def facts(self) -> Iterator[Problem]:
        """What the manifests say otherwise."""
        a, b = (
            side.opened.manifest.model_dump(mode="json", include=set(_FACTS))
            for side in (self._a, self._b)
        )
        for name in _FACTS:
            for key in dict.fromkeys((*a[name], *b[name])):
                where = f"manifest.{name}.{key}"
                if (name == "trainer" and key in EXPECTED) or self._passes_over(where, ()):
                    continue
                absent = "(nothing)"
                difference = compare_values(
                    where, name, a[name].get(key, absent), b[name].get(key, absent)
                )
                if difference is not None:
                    place = f"{where}{difference.place}"
                    yield Problem(place, "fact", f"{difference.a} and {difference.b}")

    def parts(
        self, pairs: Sequence[Pair], tensors: Sequence[TensorDifference]
    ) -> Iterator[PartDifference]:
        """What is said above, by part."""
        num_tensors = Counter(self._a.opened.entry(pair.fqn).part for pair in pairs)
        different: dict[str, list[str]] = {}
        named = [*zip(self._parts_of_names, map(str, self.names), strict=True)]
        named += [(item.part, str(item)) for item in self.sorted_values()]
        named += [(item.part, str(item)) for item in tensors]
        for part, line in named:
            different.setdefault(part, []).append(line)
        for part in sorted({*num_tensors, *self.num_values, *different}):
            lines = tuple(different.get(part, ()))
            yield PartDifference(part, num_tensors[part], self.num_values[part], lines)

    def sorted_values(self) -> list[ValueDifference]:
        """Causes before what follows from them.

        Positions, schedules and generators; then options of parts that hold tensors; then the
        trainer state, whose losses follow from all.
        """
        with_tensors = {e.part for side in (self._a, self._b) for e in side.tensors.values()}

        def place(item: ValueDifference) -> tuple[bool, bool]:
            return item.part in self._trainer_parts, item.part in with_tensors

        return sorted(self.values, key=place)

    def _name_in(self, fqn: str, stored: Container[str]) -> str | None:
        """The name of a leaf among those of the other side: its own before those tied to it."""
        if fqn in stored:
            return fqn
        names = (*self._a.ties.names(fqn), *self._b.ties.names(fqn))
        return next((name for name in names if name in stored), None)

    def _passes_over(self, fqn: str, path: Sequence[object]) -> bool:
        is_expected = len(path) == 2 and path[1] in EXPECTED
        if is_expected:
            self._trainer_parts.add(path[0])
        if is_expected or any(fnmatchcase(fqn, pattern) for pattern in self._options.ignored):
            self.passed_over.append(fqn)
            return True
        return False

    def _note(self, fqn: str, part: str, kind: str, message: str) -> None:
        self.names.append(Problem(fqn, kind, message))
        self._parts_of_names.append(part)

    def _cannot_compare(self, where: str) -> None:
        message = (
            f"each rank has its own, of {self._a.world_size} rank(s) in A and "
            f"{self._b.world_size} in B"
        )
        self.uncompared.append(Problem(where, "per_rank", message))
