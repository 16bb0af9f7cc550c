"""Directories of megatron-core's ``torch_dist``: DCP, and what all ranks share in ``common.pt``."""

from __future__ import annotations

import json
from dataclasses import replace

from dcp_resume.errors import Problem
from dcp_resume.interop.dcp_directory import lay_out_dcp, read_dcp
from dcp_resume.interop.foreign import Foreign, Source
from dcp_resume.interop.formats import Format
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile
from dcp_resume.interop.torch_file import MALFORMED, collect, lay_out_torch, read_saved
from dcp_resume.interop.torch_objects import flatten_leaves

__all__ = ["COMMON_NAME", "CONFIG_NAME", "lay_out_megatron", "read_megatron"]

COMMON_NAME = "common.pt"
CONFIG_NAME = "metadata.json"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def read_megatron(source: Source) -> Foreign:
    """Open a directory.

    Raises:
        ForeignDamage: Malformed, or a name in both halves.
        StorageError: The store failed.
    """
    foreign = replace(read_dcp(source), format=Format.MEGATRON)
    sizes = source.sizes()
    if COMMON_NAME not in sizes:
        return foreign
    saved = read_saved(source, COMMON_NAME, sizes[COMMON_NAME])
    try:
        tensors, values, ties, left = collect(saved, flatten_leaves(saved.tree))
    except MALFORMED as error:
        raise source.damage([Problem(COMMON_NAME, "torch", str(error))]) from error
    known = {*foreign.tensors, *foreign.values}
    twice = sorted(known & {*tensors, *values})
    if twice:
        message = "it is in common.pt and among the shards"
        raise source.damage([Problem(name, "duplicate", message) for name in twice])
    return replace(
        foreign,
        tensors={**foreign.tensors, **tensors},
        values={**foreign.values, **values},
        ties={**foreign.ties, **ties},
        left=(*foreign.left, *left),
    ).checked(sizes)


def lay_out_megatron(outgoing: Outgoing) -> list[OutgoingFile]:
    """The files of a directory; the one that names the format comes last, as there."""
    no_tensors = replace(outgoing, tensors=(), ties={})
    return [
        *lay_out_torch(no_tensors, COMMON_NAME),
        *lay_out_dcp(replace(outgoing, values={})),
        OutgoingFile(CONFIG_NAME, (json.dumps(_CONFIG).encode(),)),
    ]
