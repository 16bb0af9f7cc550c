"""Step directories of InfiniTrain: model, optimizer and trainer state, a file each."""

from __future__ import annotations

import json
import re
import struct
from typing import Any

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.interop.foreign import Foreign, ForeignTensor, Region, Source, row_major
from dcp_resume.interop.formats import Format
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile, OutgoingTensor, Segment
from dcp_resume.manifest.boxes import Box

__all__ = ["DTYPES", "MAGIC", "MODEL_NAME", "lay_out_infinitrain", "read_infinitrain"]

MAGIC = 0x54504B43
MODEL_NAME, OPTIMIZER_NAME = "model.ckpt", "optimizer.ckpt"
TRAINER_NAME = "trainer_state.json"
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 4096
READ_AHEAD = 64 * 1024
DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32"),
    *("uint64", "int64", "bfloat16", "float16", "float32", "float64"),
)
"""By the number that a file has for them."""
_MODEL_FACTS = ("n_layer", "n_head", "n_kv_head", "n_embd", "vocab_size")
_SIZES = ("ddp_size", "tp_size", "sp_size", "pp_size")
_WRAPPED = "module."
_RANK_0 = "rank_000000/"


class _Cursor:
    """Reads a file from front to back, passing over the data."""

    def __init__(self, source: Source, key: str, size: int) -> None:
        self._source, self._key, self._size = source, key, size
        self.at = 0
        self._start, self._ahead = 0, b""

    def take(self, length: int) -> bytes:
        begin = self.at - self._start
        if not 0 <= begin <= begin + length <= len(self._ahead):
            stop = min(self._size, self.at + max(length, READ_AHEAD))
            self._ahead = self._source.read(self._key, self.at, stop)
            self._start, begin = self.at, 0
        data = self._ahead[begin : begin + length]
        if len(data) != length:
            raise ValueError(f"it ends at byte {self._size}, in the middle of a record")
        self.at += length
        return data

    def number(self, kind: str) -> int:
        packing = struct.Struct(f"<{kind}")
        return int(packing.unpack(self.take(packing.size))[0])


def read_infinitrain(source: Source) -> Foreign:
    """Open a directory of one rank, or of data-parallel ranks, of which the first is read.

    Raises:
        ForeignFormat: Ranks that hold shards; the format does not say of what.
        ForeignDamage: Malformed; every problem is listed.
        StorageError: The store failed.
    """
    sizes = source.sizes()
    prefix = "" if MODEL_NAME in sizes else _RANK_0
    if prefix + MODEL_NAME not in sizes:
        raise source.wrong_format("a directory with model.ckpt", "one without")
    facts = _trainer_facts(source, prefix + TRAINER_NAME, sizes)
    ranks = {key.partition("/")[0] for key in sizes if key.startswith("rank_")}
    if prefix and len(ranks) != facts.get("ddp_size", 1):
        split = {name: facts[name] for name in _SIZES if name in facts}
        found = f"shards of {len(ranks)} ranks ({split}), and nothing says how they are cut"
        raise source.wrong_format("ranks that hold copies", found)
    tensors: dict[str, ForeignTensor] = {}
    problems: list[Problem] = []
    for name, part in ((MODEL_NAME, "model"), (OPTIMIZER_NAME, "optim")):
        key = prefix + name
        if key in sizes:
            try:
                tensors.update(_read_file(source, key, sizes[key], part))
            except (ValueError, LookupError, struct.error) as error:
                problems.append(Problem(key, "infinitrain", str(error)))
    if problems:
        raise source.damage(problems)
    return Foreign(
        source,
        Format.INFINITRAIN,
        tensors,
        step=facts.get("global_step"),
        trainer={"last_lr": (facts["last_lr"],)} if "last_lr" in facts else {},
        model={name: facts[name] for name in _MODEL_FACTS if name in facts},
    ).checked(sizes)


def _trainer_facts(source: Source, key: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Numbers by name. Published versions write no valid JSON: a comma is missing."""
    if key not in sizes:
        return {}
    text = source.read_whole(key, 1 << 20).decode(errors="replace")
    found = re.findall(r'"(\w{1,40})"\s*:\s*(-?[0-9][0-9.eE+-]{0,30})', text)
    facts: dict[str, Any] = {}
    known = {*_MODEL_FACTS, *_SIZES, "global_step", "last_lr"}
    for name, number in ((n, v) for n, v in found if n in known):
        try:
            facts[name] = float(number) if name == "last_lr" else int(number)
        except ValueError as error:
            message = f"{name} is {number!r}"
            raise source.damage([Problem(key, "trainer", message)]) from error
    return facts


def _read_file(source: Source, key: str, size: int, part: str) -> dict[str, ForeignTensor]:
    cursor = _Cursor(source, key, size)
    magic, version, count = (cursor.number("I") for _ in range(3))
    if (magic, version) != (MAGIC, 1):
        raise ValueError(f"expected {MAGIC:#x} of version 1, found {magic:#x}, {version}")
    if count > MAX_TENSORS:
        raise ValueError(f"{count} tensors, at most {MAX_TENSORS} are read")
    found: dict[str, ForeignTensor] = {}
    for _ in range(count):
        length = cursor.number("I")
        if length > MAX_NAME_BYTES:
            raise ValueError(f"a name of {length} bytes")
        name = cursor.take(length).decode()
        code, ndim = cursor.number("b"), cursor.number("I")
        if not 0 <= code < len(DTYPES) or ndim > 64:
            raise ValueError(f"{name} has dtype {code} and {ndim} dims")
        shape = tuple(cursor.number("q") for _ in range(ndim))
        num_bytes, box = cursor.number("Q"), Box.whole(shape)
        if num_bytes != box.volume * ITEMSIZES[DTYPES[code]] or cursor.at + num_bytes > size:
            raise ValueError(f"{name}: {num_bytes} bytes at {cursor.at} of {size}")
        if name in found:
            raise ValueError(f"{name!r} occurs twice")
        region = Region(box, key, cursor.at, row_major(shape))
        found[name] = ForeignTensor((part, name), DTYPES[code], shape, (region,))
        cursor.at += num_bytes
    is_wrapped = bool(found) and all(name.startswith(_WRAPPED) for name in found)
    names = {name: name.removeprefix(_WRAPPED) if is_wrapped else name for name in found}
    return {
        f"{part}.{names[name]}": ForeignTensor((part, names[name]), t.dtype, t.shape, t.regions)
        for name, t in found.items()
    }


def lay_out_infinitrain(outgoing: Outgoing) -> list[OutgoingFile]:
    """The files of a directory of one rank; the trainer state comes last, as there."""
    parts: dict[str, list[OutgoingTensor]] = {"model": [], "optim": []}
    for tensor in outgoing.tensors:
        parts[str(tensor.path[0])].append(tensor)
    files = [_file(MODEL_NAME, parts["model"])]
    if parts["optim"]:
        files.append(_file(OPTIMIZER_NAME, parts["optim"]))
    state: dict[str, Any] = {name: outgoing.model.get(name, 0) for name in _MODEL_FACTS}
    rates = outgoing.trainer.get("last_lr") or (0.0,)
    state |= {"global_step": outgoing.step, "consumed_batches": 0, "last_lr": rates[0]}
    state |= dict.fromkeys(_SIZES, 1)
    return [*files, OutgoingFile(TRAINER_NAME, (json.dumps(state, indent=2).encode(),))]


def _file(name: str, tensors: list[OutgoingTensor]) -> OutgoingFile:
    segments: list[Segment] = [struct.pack("<III", MAGIC, 1, len(tensors))]
    for tensor in tensors:
        encoded = tensor.name.partition(".")[2].encode()
        size = tensor.stored.box.volume * tensor.stored.itemsize
        head = struct.pack("<I", len(encoded)) + encoded
        head += struct.pack("<bI", DTYPES.index(tensor.dtype), len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}qQ", *tensor.shape, size)
        segments += [head, tensor.stored]
    return OutgoingFile(name, tuple(segments))
