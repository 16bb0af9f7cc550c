"""Safetensors: one file, several with an index, or the shards of DCP's HuggingFace writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dcp_resume.errors import Problem
from dcp_resume.format.dtypes import DTYPES, RESERVED_KEY
from dcp_resume.format.strict_json import load_strict
from dcp_resume.interop.foreign import Foreign, ForeignTensor, Region, Source, row_major
from dcp_resume.interop.formats import Format
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile, OutgoingTensor, Segment
from dcp_resume.interop.weight_index import index_problems, read_weight_map
from dcp_resume.manifest.boxes import Box

__all__ = ["INDEX_NAME", "lay_out_safetensors", "read_safetensors"]

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER = 100_000_000
ALIGNMENT = 8
_CODES = {
    info.safetensors_name: info.name
    for info in DTYPES.values()
    if info.safetensors_name is not None
}


def read_safetensors(source: Source) -> Foreign:
    """Open a file, or a directory; the index, if there is one, must name exactly what is there.

    Raises:
        ForeignDamage: Malformed; every problem is listed.
        StorageError: The store failed.
    """
    sizes = source.sizes()
    keys = sorted(key for key in sizes if key.endswith(".safetensors"))
    keys = [source.key] if source.key else [key for key in keys if "/" not in key]
    problems: list[Problem] = []
    found: dict[str, ForeignTensor] = {}
    aliases: dict[str, str] = {}
    places: dict[str, str] = {}
    for key in keys:
        try:
            header, data_at = _header(source, key, sizes[key])
            metadata = _metadata(header)
            for name, entry in header.items():
                _add(found, name, _tensor(name, entry, metadata, key, data_at))
                places[name] = key
            aliases.update((k, v) for k, v in metadata.items() if isinstance(v, str))
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            problems.append(Problem(key, "header", f"malformed ({error})"))
    if INDEX_NAME in sizes and not problems:
        problems = index_problems(read_weight_map(source, INDEX_NAME), places, sizes)
    if problems:
        raise source.damage(problems)
    ties = {a: b for a, b in aliases.items() if a not in found and b in found}
    tensors = found | {alias: found[name] for alias, name in ties.items()}
    renamed = {n: _renamed(t, n) for n, t in tensors.items()}
    return Foreign(source, Format.SAFETENSORS, renamed, ties=ties).checked(sizes)


def _renamed(tensor: ForeignTensor, name: str) -> ForeignTensor:
    return ForeignTensor((name,), tensor.dtype, tensor.shape, tensor.regions)


def _header(source: Source, key: str, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise ValueError(f"{size} bytes are no safetensors file")
    length = int.from_bytes(source.read(key, 0, 8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes, in a file of {size}")
    header = load_strict(source.read(key, 8, 8 + length))
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    return header, 8 + length


def _metadata(header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.pop(RESERVED_KEY, {})
    if not isinstance(metadata, dict):
        raise ValueError("the metadata is no object")
    sharding = metadata.pop("DCP_SHARDING_INFO", "{}")
    metadata["DCP_SHARDING_INFO"] = load_strict(sharding.encode())
    return metadata


def _extent(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 64:
        raise ValueError("expected a list of numbers")
    if not all(type(item) is int and 0 <= item < 2**62 for item in value):
        raise ValueError("expected numbers from 0 on")
    return tuple(value)


def _tensor(
    name: str, entry: dict[str, Any], metadata: dict[str, Any], key: str, data_at: int
) -> ForeignTensor:
    dtype, sizes = _CODES.get(entry["dtype"]), _extent(entry["shape"])
    if dtype is None:
        raise ValueError(f"{name} has the dtype {entry['dtype']!r:.40}, which is not known")
    begin, end = _extent(entry["data_offsets"])
    sharding = metadata["DCP_SHARDING_INFO"].get(name)
    box = Box.whole(sizes)
    if isinstance(sharding, dict):
        box = Box(_extent(sharding["saved_offsets"]), sizes)
    if end - begin != box.volume * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, not those of {dtype} {sizes}")
    region = Region(box, key, data_at + begin, row_major(sizes))
    return ForeignTensor((name,), dtype, box.stops, (region,))


def _add(found: dict[str, ForeignTensor], name: str, tensor: ForeignTensor) -> None:
    """Join shards of one tensor; the shape reaches as far as the furthest."""
    known = found.get(name)
    if known is None:
        found[name] = tensor
        return
    if known.dtype != tensor.dtype or len(known.shape) != len(tensor.shape):
        raise ValueError(f"{name} is {known.dtype} elsewhere, or has other dims")
    shape = tuple(map(max, known.shape, tensor.shape))
    found[name] = ForeignTensor(known.path, known.dtype, shape, known.regions + tensor.regions)


def lay_out_safetensors(outgoing: Outgoing, name: str) -> list[OutgoingFile]:
    """One file named ``name``, or, of a directory, files of up to ``shard_bytes`` and their index.

    Args:
        outgoing: What is exported.
        name: Of the one file; empty for a directory.
    """
    ties = {further: first for further, (_, first) in outgoing.ties.items()}
    if name:
        return [_file(name, outgoing.tensors, ties)]
    shards: list[list[OutgoingTensor]] = [[]]
    filled = 0
    for tensor in outgoing.tensors:
        size = tensor.stored.box.volume * tensor.stored.itemsize
        if shards[-1] and filled + size > outgoing.shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return [_file("model.safetensors", outgoing.tensors, ties)]
    count = len(shards)
    names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = []
    weight_map: dict[str, str] = {}
    total = 0
    for shard_name, shard in zip(names, shards, strict=True):
        own = {t.name for t in shard}
        files.append(_file(shard_name, shard, {a: b for a, b in ties.items() if b in own}))
        weight_map.update((tensor.name, shard_name) for tensor in shard)
        total += sum(t.stored.box.volume * t.stored.itemsize for t in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    # Last: whoever reads the directory looks for it first.
    text = json.dumps(index, indent=2, ensure_ascii=False).encode()
    return [*files, OutgoingFile(INDEX_NAME, (text,))]


def _file(
    name: str, tensors: tuple[OutgoingTensor, ...] | list[OutgoingTensor], ties: Mapping[str, str]
) -> OutgoingFile:
    """A file whose metadata names ties as ``safetensors.torch.save_model`` does."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.stored.itemsize)
    header: dict[str, Any] = {RESERVED_KEY: {"format": "pt", **ties}}
    at = 0
    for tensor in ordered:
        size = tensor.stored.box.volume * tensor.stored.itemsize
        code = DTYPES[tensor.dtype].safetensors_name
        offsets = [at, at + size]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
        at += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    segments: list[Segment] = [len(text).to_bytes(8, "little") + text]
    return OutgoingFile(name, (*segments, *(tensor.stored for tensor in ordered)))
