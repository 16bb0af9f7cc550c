"""Hugging Face's older shards: files of ``torch.save`` beside one another, and their index."""

from __future__ import annotations

from typing import Any

from dcp_resume.errors import Problem
from dcp_resume.interop.foreign import Foreign, ForeignTensor, Source
from dcp_resume.interop.formats import Format
from dcp_resume.interop.torch_file import MALFORMED, collect, read_saved
from dcp_resume.interop.torch_objects import flatten_leaves
from dcp_resume.interop.weight_index import index_problems, read_weight_map
from dcp_resume.planning.flattening import Path

__all__ = ["BIN_INDEX_NAME", "BIN_NAME", "read_torch_shards"]

BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"


def read_torch_shards(source: Source) -> Foreign:
    """Open the files that the index names, or the one file of a model that has none.

    Other files of the directory, such as an optimizer's, are left alone.

    Raises:
        ForeignDamage: Malformed, or files and index contradict each other; every problem is listed.
        ForeignFormat: A file is from before torch 1.6.
        StorageError: The store failed.
    """
    sizes = source.sizes()
    is_indexed = BIN_INDEX_NAME in sizes
    named = read_weight_map(source, BIN_INDEX_NAME) if is_indexed else {}
    keys = sorted({*named.values()}) if is_indexed else [BIN_NAME]
    tensors: dict[str, ForeignTensor] = {}
    values: dict[str, tuple[Path, Any]] = {}
    ties: dict[str, str] = {}
    left: list[Problem] = []
    places: dict[str, str] = {}
    problems = [Problem(key, "missing", "the index names it") for key in keys if key not in sizes]
    for key in keys if not problems else ():
        if source.read(key, 0, min(1, sizes[key])) == b"\x80":
            found = "a directory whose files are bare pickles, as torch.save wrote before 1.6"
            raise source.wrong_format("shards of torch.save; save them with a newer torch", found)
        saved = read_saved(source, key, sizes[key])
        try:
            own = collect(saved, flatten_leaves(saved.tree))
        except MALFORMED as error:
            raise source.damage([Problem(key, "torch", str(error))]) from error
        for name in (*own[0], *own[1]):
            if name in places:
                problems.append(Problem(name, "twice", f"it lies in {places[name]} and in {key}"))
            places[name] = key
        tensors |= own[0]
        values |= own[1]
        ties |= own[2]
        left += own[3]
    if is_indexed and not problems:
        problems = index_problems(named, places, sizes)
    if problems:
        raise source.damage(problems)
    return Foreign(source, Format.TORCH, tensors, values, ties, left=tuple(left)).checked(sizes)
