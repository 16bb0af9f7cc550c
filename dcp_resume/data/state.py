"""What is saved of a place in the data, and what it means for a job that is built otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_type_hints

from dcp_resume.data.position import BatchSplit, Position, Tail, dividing_sizes
from dcp_resume.errors import ConfigurationError
from dcp_resume.manifest.report import ReportItem, Severity

__all__ = ["DataSetup", "DataState", "compare", "refuse"]

VERSION = 1


@dataclass(frozen=True, slots=True)
class DataSetup:
    """What gives a position its meaning; equal on all ranks."""

    num_samples: int
    seed: int
    order: str
    tail: str
    global_batch: int
    micro_batch: int
    num_ranks: int
    fingerprint: str

    @property
    def split(self) -> BatchSplit:
        """The global batch and its parts.

        Raises:
            ConfigurationError: They contradict each other.
        """
        return BatchSplit(self.global_batch, self.micro_batch, self.num_ranks)


@dataclass(frozen=True, slots=True)
class DataState:
    """A place in the data as it is saved; equal on all ranks."""

    position: Position
    next_sample: int
    """Index in the dataset of the sample that comes next: tells if another order is at work."""
    setup: DataSetup

    def to_dict(self) -> dict[str, int | str]:
        """Plain values, for saving."""
        return {
            "version": VERSION,
            **asdict(self.position),
            "next_sample": self.next_sample,
            **asdict(self.setup),
        }

    @classmethod
    def parse(cls, saved: Mapping[str, Any]) -> Self:
        """Read what ``to_dict`` returned.

        Raises:
            ConfigurationError: Another version wrote it, or it contradicts itself.
        """
        version, unknown = saved.get("version"), sorted(set(saved) - set(_TYPES))
        if version != VERSION or unknown:
            raise _unusable(
                f"it is of version {version!r} with unknown fields {unknown}; this library knows "
                f"version {VERSION}: update it"
            )
        wrong = [name for name, kind in _TYPES.items() if type(saved.get(name)) is not kind]
        if wrong:
            raise _unusable(
                "fields are missing or of another type: "
                + ", ".join(f"{name} = {saved.get(name)!r}" for name in wrong)
            )
        position = Position(**{item.name: saved[item.name] for item in fields(Position)})
        setup = DataSetup(**{item.name: saved[item.name] for item in fields(DataSetup)})
        if min(asdict(position).values()) < 0:
            raise _unusable(f"a number is negative: {position}")
        try:
            accumulation = setup.split.accumulation
        except ConfigurationError as error:
            raise _unusable(str(error)) from error
        received = position.received_micro_batches
        if received >= accumulation:
            raise _unusable(
                f"micro batch {received} of {accumulation} of a step was the last that was "
                f"received, which would have completed the step"
            )
        return cls(position, saved["next_sample"], setup)


_TYPES = {
    "version": int,
    "next_sample": int,
    **get_type_hints(Position),
    **get_type_hints(DataSetup),
}


def _unusable(reason: str) -> ConfigurationError:
    return ConfigurationError(f"the saved data position cannot be used: {reason}", option="data")


def refuse(items: Iterable[ReportItem]) -> None:
    """Raise if there is an item.

    Raises:
        ConfigurationError: There is.
    """
    lines = [f"{item.where}: {item.message}" for item in items]
    if lines:
        raise ConfigurationError(
            "cannot go on from the saved data position:\n  " + "\n  ".join(lines), option="data"
        )


def compare(
    saved: DataState, now: DataSetup, sample_at: Callable[[int, int], int]
) -> Iterator[ReportItem]:
    """What differs between a saved place in the data and the job that shall go on from it.

    Refused items of kind ``position`` are impossible to go on from, those of kind ``data`` unwise.

    Args:
        saved: As saved.
        now: The job.
        sample_at: Epoch and place → index in the dataset, as the job orders it.
    """
    order = list(_order_items(saved, now))
    yield from order
    yield from _fingerprint_items(saved.setup, now)
    epoch, consumed = saved.position.epoch, saved.position.epoch_samples
    if consumed >= now.num_samples:
        yield ReportItem(
            Severity.REFUSE,
            "position",
            "epoch_samples",
            f"{consumed} samples of epoch {epoch} were consumed, of an epoch of "
            f"{now.num_samples}: past the end; give the dataset that it was saved with",
        )
    elif not order and sample_at(epoch, consumed) != saved.next_sample:
        yield ReportItem(
            Severity.REFUSE,
            "data",
            "next_sample",
            f"sample {saved.next_sample} came next, now {sample_at(epoch, consumed)}, with equal "
            f"seed and length: this release of torch shuffles otherwise; resume with the one that "
            f"saved",
        )
    yield from _split_items(saved, now)


def _order_items(saved: DataState, now: DataSetup) -> Iterator[ReportItem]:
    for name in ("num_samples", "seed", "order"):
        was, now_is = getattr(saved.setup, name), getattr(now, name)
        if was != now_is:
            yield ReportItem(
                Severity.REFUSE,
                "data",
                name,
                f"saved {was!r}, now {now_is!r}: the order of epoch {saved.position.epoch} is "
                f"another one, and {saved.position.epoch_samples} of its "
                f"{saved.setup.num_samples} samples were consumed, so some would come twice and "
                f"some never",
            )


def _fingerprint_items(saved: DataSetup, now: DataSetup) -> Iterator[ReportItem]:
    if saved.fingerprint == now.fingerprint:
        return
    severity, verdict = Severity.REFUSE, "this is another dataset"
    if not saved.fingerprint or not now.fingerprint:
        severity, verdict = Severity.WARN, "nothing tells whether it is the same dataset"
    message = f"saved {saved.fingerprint!r}, now {now.fingerprint!r}: {verdict}"
    yield ReportItem(severity, "data", "fingerprint", message)


def _split_items(saved: DataState, now: DataSetup) -> Iterator[ReportItem]:
    was, position = saved.setup, saved.position
    if was.tail != now.tail:
        fate = "dropped" if now.tail == Tail.DROP.value else "carried into the next epoch"
        message = (
            f"saved {was.tail!r}, now {now.tail!r}: from here on, samples that fill no batch at an "
            f"epoch's end are {fate}"
        )
        yield ReportItem(Severity.WARN, "data", "tail", message)
    if (was.split, was.tail) == (now.split, now.tail):
        return
    names = ("global_batch", "num_ranks", "micro_batch")
    changed = [name for name in names if getattr(was, name) != getattr(now, name)]
    severity, kind, where = Severity.REFUSE, "data", changed[0] if changed else "tail"
    if changed and position.received_micro_batches:
        kind = "position"
        verdict = (
            f"it was saved after micro batch {position.received_micro_batches} of "
            f"{was.split.accumulation} of a step, which only the same split can finish"
        )
    elif now.tail == Tail.DROP.value and position.epoch_samples % now.global_batch:
        verdict = _unaligned(position.epoch_samples, now.split)
    elif changed:
        severity = Severity.WARN if where == "global_batch" else Severity.OK
        verdict = f"goes on exactly, at sample {position.epoch_samples} of epoch {position.epoch}"
    else:
        return
    yield ReportItem(severity, kind, where, f"saved {was.split}, now {now.split}; {verdict}")


def _unaligned(consumed: int, split: BatchSplit) -> str:
    sizes = dividing_sizes(consumed, split.unit, split.global_batch)
    remedy = f"no multiple of {split.micro_batch} * {split.num_ranks} ranks divides it"
    if sizes:
        remedy = f"the nearest that divide are {' and '.join(map(str, sizes))}"
    return (
        f"{consumed} consumed samples of the epoch / global batch {split.global_batch} leaves a "
        f"remainder of {consumed % split.global_batch}, and Tail.DROP cuts an epoch into whole "
        f"batches; {remedy}; or use Tail.CARRY, which goes on from any position"
    )
