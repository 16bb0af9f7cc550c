"""Write a checkpoint in another library's format, and prove that it reads back bit for bit.

1. Open. The checkpoint's documents are read and proved.
2. Choose. What the format cannot hold is refused, or dropped and listed, before a byte is written.
3. Write. Verified reads fill a window, which is handed on; memory does not grow with the tensors.
4. Prove. What was written is opened as a foreign checkpoint and compared with the source.
5. Publish. It gets its name.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcp_resume.errors import ConfigurationError, ExportMismatch, Problem, Unheld
from dcp_resume.format.dtypes import DTYPES, ITEMSIZES
from dcp_resume.format.leaves import decode_leaf, encode_leaf
from dcp_resume.interop import infinitrain
from dcp_resume.interop.dcp_directory import lay_out_dcp
from dcp_resume.interop.foreign import Foreign, Source, fill_targets
from dcp_resume.interop.formats import Format, Leftovers
from dcp_resume.interop.infinitrain import lay_out_infinitrain
from dcp_resume.interop.llmc import lay_out_llmc
from dcp_resume.interop.megatron import lay_out_megatron
from dcp_resume.interop.opening import open_foreign, split_url
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile, OutgoingTensor
from dcp_resume.interop.publishing import published
from dcp_resume.interop.safetensors import lay_out_safetensors
from dcp_resume.interop.torch_file import lay_out_torch
from dcp_resume.interop.torch_objects import leaf_problem
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.manifest.signing import ANYONE, Trust
from dcp_resume.planning.flattening import Path, fqn_of, part_of
from dcp_resume.planning.padding import logical_shape
from dcp_resume.problems import summarise
from dcp_resume.session.located import Located
from dcp_resume.session.opening import open_checkpoint
from dcp_resume.session.side import Side
from dcp_resume.session.streaming import StoredFiller
from dcp_resume.session.targets import Target
from dcp_resume.session.windows import StoredBox, check_window, cut_windows
from dcp_resume.storage import ObjectStore, open_store

__all__ = ["ExportOptions", "ExportResult", "export_checkpoint"]


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How to export.

    Raises:
        ConfigurationError: The window is too small.
    """

    parts: tuple[str, ...] = ()
    """Of the state; none for all. Names of a single part lose its name in front."""
    loose: str | None = None
    """Part whose names lose its name in front."""
    leftovers: Leftovers = Leftovers.REFUSE
    shard_bytes: int = 5 * 1000**3
    """Most bytes of a file of safetensors or DCP, if its tensors are smaller."""
    window_bytes: int = 64 * 1024 * 1024
    """Bytes in transit; the proof needs twice as much."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with bytes written or proved, and both in all."""
    trust: Trust = ANYONE
    open_url: Callable[[str], ObjectStore] = open_store
    """Opens the target's store."""

    def __post_init__(self) -> None:
        check_window(self.window_bytes)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was exported, and read back bit for bit."""

    format: Format
    step: int
    files: tuple[str, ...]
    num_tensors: int
    num_values: int
    num_bytes: int
    ties: tuple[str, ...]
    dropped: tuple[Problem, ...]
    """What the format cannot hold."""
    duration_s: float


def export_checkpoint(
    source: ObjectStore,
    located: Located,
    url: str,
    form: Format,
    options: ExportOptions = ExportOptions(),
) -> ExportResult:
    """Write the located checkpoint to a file or directory of another format.

    Args:
        source: Root of the run, or a checkpoint's directory.
        located: Which checkpoint.
        url: Path or URL of the target, where nothing must be yet.
        form: Its format.
        options: Parts, what to do with what does not fit, memory.

    Raises:
        ConfigurationError: There is something at the target, no such part, or a name that would
            be there twice.
        Unheld: The format cannot hold part of the state; nothing was written.
        InvalidCheckpoint: The source is damaged; nothing was published.
        ExportMismatch: What was written does not read back; nothing was published.
        StorageError: A store failed; nothing was published.
    """
    started = time.monotonic()
    opened = open_checkpoint(source, located.prefix, located.manifest, trust=options.trust)
    side = Side(source, opened)
    outgoing, dropped = _Choice(side, form, options).outgoing()
    if dropped and options.leftovers is Leftovers.REFUSE:
        raise Unheld(
            f"{form.value} cannot hold {len(dropped)} item(s) of step {opened.manifest.step}; "
            f"nothing was written:\n{summarise(dropped)}\nname parts, or choose to drop them",
            url=url,
            problems=tuple(dropped),
        )
    is_file = not form.is_directory or url.endswith(".safetensors")
    name = split_url(url)[1] if is_file else ""
    files = _lay_out(outgoing, form, name, url)
    filler = StoredFiller(source, opened)
    total = sum(file.size for file in files)
    meter = _Meter(options.progress, total + sum(_num_bytes(t) for t in outgoing.tensors))
    size = max(1, min(options.window_bytes, total))
    with published(url, [file.key for file in files], options.open_url, name) as target:
        memory = np.empty(size, np.uint8).data
        for file in files:
            buffers = meter.counted(file.buffers(memory, filler.fill))
            target.store.write(file.key, buffers, size=file.size)
        _prove(outgoing, form, target, filler, memory, meter)
    return ExportResult(
        format=form,
        step=outgoing.step,
        files=tuple(file.key for file in files),
        num_tensors=len(outgoing.tensors),
        num_values=len(outgoing.values),
        num_bytes=total,
        ties=tuple(outgoing.ties),
        dropped=tuple(dropped),
        duration_s=time.monotonic() - started,
    )


def _num_bytes(tensor: OutgoingTensor) -> int:
    return math.prod(tensor.shape) * tensor.stored.itemsize


class _Meter:
    """Counts bytes."""

    def __init__(self, progress: Callable[[int, int], None], total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._progress(self._done, self._total)

    def counted(self, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        for buffer in buffers:
            yield buffer
            self.add(len(buffer))


def _lay_out(outgoing: Outgoing, form: Format, name: str, url: str) -> list[OutgoingFile]:
    match form:
        case Format.SAFETENSORS:
            return lay_out_safetensors(outgoing, name)
        case Format.TORCH:
            return lay_out_torch(outgoing, name)
        case Format.DCP:
            return lay_out_dcp(outgoing)
        case Format.MEGATRON:
            return lay_out_megatron(outgoing)
        case Format.LLMC:
            return lay_out_llmc(outgoing, name, url)
        case Format.INFINITRAIN:
            return lay_out_infinitrain(outgoing)


class _Choice:
    """What of a checkpoint goes out, under which names.

    Raises:
        ConfigurationError: A part that is not there, or a name that would be there twice.
    """

    def __init__(self, side: Side, form: Format, options: ExportOptions) -> None:
        self._side, self._form, self._options = side, form, options
        known = side.opened.manifest.parts
        self._parts = set(options.parts or known)
        loose = () if options.loose is None else (options.loose,)
        unknown = sorted({*options.parts, *loose} - set(known))
        if unknown:
            raise ConfigurationError(
                f"no part {unknown[0]!r} in this checkpoint, which has {', '.join(known)}",
                option="parts",
            )
        is_single = len(options.parts) == 1 and form is not Format.INFINITRAIN
        self._bare = {*loose, *(options.parts if is_single else ())}
        self._dropped: list[Problem] = []

    def outgoing(self) -> tuple[Outgoing, list[Problem]]:
        tensors: list[OutgoingTensor] = []
        ties: dict[str, tuple[Path, str]] = {}
        first: dict[int, str] = {}
        for fqn, entry in self._side.tensors.items():
            if entry.part not in self._parts or not self._holds(entry):
                continue
            tensor = self._tensor(fqn, entry)
            number = self._side.opened.tensor_ids[fqn]
            if number not in first or self._form is Format.INFINITRAIN:
                first[number] = tensor.name
                tensors.append(tensor)
            else:
                ties[tensor.name] = tensor.path, first[number]
        manifest = self._side.opened.manifest
        values = self._values()
        self._check_names([*(tensor.name for tensor in tensors), *ties, *values])
        outgoing = Outgoing(
            tensors=tuple(tensors),
            values=values,
            ties=ties,
            step=manifest.step,
            trainer=manifest.trainer.model_dump(),
            model=manifest.model,
            shard_bytes=self._options.shard_bytes,
        )
        for part in self._side.per_rank_parts:
            if part in self._parts:
                self._dropped.append(Problem(part, "per_rank", "it has values of each rank's own"))
        return outgoing, self._dropped

    def _check_names(self, names: list[str]) -> None:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigurationError(
                f"{twice[0]!r} would be there twice, once of {self._options.loose!r} without its "
                f"name in front; export that part alone",
                option="loose",
            )

    def _tensor(self, fqn: str, entry: TensorEntry) -> OutgoingTensor:
        shape, path = logical_shape(entry), self._path(entry.path)
        stored = StoredBox(fqn, Box.whole(shape), ITEMSIZES[entry.dtype])
        return OutgoingTensor(fqn_of(path), path, fqn, entry.dtype, shape, stored)

    def _path(self, path: Path) -> Path:
        return path[1:] if part_of(path) in self._bare and len(path) > 1 else path

    def _holds(self, entry: TensorEntry) -> bool:
        reason = ""
        if entry.kind == "per_rank":
            reason = "each rank has its own, and the format holds one"
        elif not _has_dtype(self._form, entry.dtype):
            reason = f"the format has no {entry.dtype}"
        elif self._form is Format.INFINITRAIN and entry.part not in ("model", "optim"):
            reason = "the format has the parts model and optim alone"
        if reason:
            self._dropped.append(Problem(entry.fqn, "tensor", reason))
        return not reason

    def _values(self) -> dict[str, tuple[Path, Any]]:
        found: dict[str, tuple[Path, Any]] = {}
        for fqn, (path, encoded) in self._side.shared_values.items():
            own = tuple(path)
            if part_of(own) not in self._parts:
                continue
            name = fqn_of(self._path(own))
            value = decode_leaf(encoded, fqn)
            problem = Problem(fqn, "value", "the format holds tensors alone")
            fault = leaf_problem(fqn, value) if self._form.holds_values else problem
            if fault is not None:
                self._dropped.append(fault)
            else:
                found[name] = self._path(own), value
        return found


def _has_dtype(form: Format, dtype: str) -> bool:
    if form is Format.SAFETENSORS:
        return DTYPES[dtype].safetensors_name is not None
    return form is not Format.INFINITRAIN or dtype in infinitrain.DTYPES


def _prove(
    outgoing: Outgoing,
    form: Format,
    target: Source,
    filler: StoredFiller,
    memory: memoryview,
    meter: _Meter,
) -> None:
    """Step 4."""
    foreign = open_foreign(target, form)
    problems = list(_name_problems(outgoing, foreign))
    if not problems:
        problems += _byte_problems(outgoing, foreign, filler, memory, meter)
    if problems:
        raise ExportMismatch(
            f"what was written to {target.url} does not read back; it was not published:\n"
            f"{summarise(problems)}\nexport again; if it stays so, the disk or this library is at "
            "fault",
            url=target.url,
            problems=tuple(problems),
        )


def _name_problems(outgoing: Outgoing, foreign: Foreign) -> Iterator[Problem]:
    expected = {t.name: (t.dtype, t.shape) for t in outgoing.tensors}
    expected.update((name, expected[first]) for name, (_, first) in outgoing.ties.items())
    found = {name: (t.dtype, t.shape) for name, t in foreign.tensors.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            yield Problem(name, "tensor", f"wrote {expected.get(name)}, read {found.get(name)}")
    if not foreign.format.holds_values:
        return
    written = {name: encode_leaf(value, name) for name, (_, value) in outgoing.values.items()}
    read = {name: encode_leaf(value, name) for name, (_, value) in foreign.values.items()}
    for name in sorted({*written, *read}):
        if name not in written or name not in read or repr(written[name]) != repr(read[name]):
            yield Problem(name, "value", f"wrote {written.get(name)!r}, read {read.get(name)!r}")


def _byte_problems(
    outgoing: Outgoing,
    foreign: Foreign,
    filler: StoredFiller,
    memory: memoryview,
    meter: _Meter,
) -> list[Problem]:
    tensors: Sequence[OutgoingTensor] = outgoing.tensors
    other = np.empty(len(memory), np.uint8).data
    problems: dict[str, Problem] = {}
    for window in cut_windows((tensor.stored for tensor in tensors), memory):
        filler.fill(window.targets)
        pairs: list[tuple[OutgoingTensor, Target, Target]] = []
        at = 0
        for number, target in zip(window.numbers, window.targets, strict=True):
            place = other[at : at + len(target.memory)]
            at += len(place)
            tensor = tensors[number]
            pairs.append((tensor, target, Target(tensor.name, target.box, place, None, None)))
        fill_targets(foreign, [read for _, _, read in pairs])
        for tensor, target, read in pairs:
            if target.memory != read.memory:
                message = f"bytes differ in {target.box}"
                problems.setdefault(tensor.name, Problem(tensor.name, "bytes", message))
        meter.add(window.num_bytes)
    return list(problems.values())
