"""``dcp-resume inspect``: what one checkpoint says of itself. Reads documents, no data."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from dcp_resume.cli.arguments import add_step, add_verb, open_url
from dcp_resume.cli.keys import read_signing
from dcp_resume.cli.printing import print_json, print_prose, print_table, size_text

if TYPE_CHECKING:
    from dcp_resume.cli.arguments import Verbs
    from dcp_resume.manifest.models import Manifest, MeshEntry, TensorEntry
    from dcp_resume.session.opening import OpenedCheckpoint

__all__ = ["add_parser"]

_DESCRIPTION = """\
Show one checkpoint: topology, trainer state, parts, and with --tensors a tree of all tensors, with
dtype, kind, shape, placements and size; --depth N sums up what lies deeper. Manifest,
catalog and index are read and proved; no data file is opened. URL is a run, or the directory of a
single checkpoint that was copied without the run's log.
"""
_EXAMPLES = """\
  dcp-resume inspect runs/a
  dcp-resume inspect runs/a --step 400 --tensors
  dcp-resume inspect runs/a --depth 2
  dcp-resume inspect /backup/step-00000400/k3v9 --json
"""

_SHOWN_RANKS = 8


def add_parser(verbs: Verbs) -> None:
    """Add the verb."""
    verb = add_verb(
        verbs,
        "inspect",
        summary="show one checkpoint",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    verb.add_argument("url", help="root of the run, or a checkpoint's directory")
    add_step(verb, "latest", "best")
    verb.add_argument("--tensors", action="store_true", help="list every tensor")
    verb.add_argument(
        "--depth",
        type=_read_depth,
        metavar="N",
        help="list tensors down to N names below the root, summed up there (default: all)",
    )
    verb.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from dcp_resume.session.finding import find_checkpoints
    from dcp_resume.session.opening import open_checkpoint

    store = open_url(arguments.url, arguments)
    trust = read_signing(arguments).trust
    (located,) = find_checkpoints(store, arguments.step, trust)
    opened = open_checkpoint(store, located.prefix, located.manifest, trust=trust, is_listed=False)
    is_full = arguments.tensors or arguments.depth is not None
    if arguments.json:
        print_json(_document(opened, is_full=is_full))
        return 0
    for name, value in _lines(opened.manifest):
        print(f"{name:<12} {value}")
    print()
    parts = [
        [name, str(part.num_tensors), str(part.num_leaves), size_text(part.num_bytes)]
        for name, part in opened.manifest.parts.items()
    ]
    print_table(("part", "tensors", "values", "in files"), parts, words={"part"})
    if is_full:
        print()
        columns = ("tensor", "dtype", "kind", "shape", "placements", "size")
        rows = list(_tree(opened.catalog.tensors, arguments.depth))
        print_table(columns, rows, words={"tensor", "dtype", "kind", "placements"})
        aliases = [entry for entry in opened.catalog.tensors if entry.alias_of]
        for entry in aliases if arguments.depth is None else ():
            print_prose(f"{entry.fqn} is an alias of {entry.alias_of}")
    return 0


def _read_depth(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def _document(opened: OpenedCheckpoint, *, is_full: bool) -> dict[str, Any]:
    from dcp_resume.manifest.wire import encode

    document: dict[str, Any] = {
        "prefix": opened.prefix,
        "manifest": json.loads(encode(opened.manifest)),
    }
    if is_full:
        catalog = json.loads(encode(opened.catalog))
        document["tensors"] = catalog["tensors"]
        document["files"] = catalog["files"]
    return document


def _lines(manifest: Manifest) -> Iterator[tuple[str, str]]:
    topology, trainer = manifest.topology, manifest.trainer
    yield "step", str(manifest.step)
    yield "run", manifest.run
    yield "attempt", f"{manifest.attempt} of generation {manifest.generation}"
    yield "created", manifest.created
    yield "size", f"{size_text(manifest.counts.num_bytes)} in {manifest.counts.files} file(s)"
    yield "world size", str(topology.world_size)
    for mesh in topology.meshes:
        yield "mesh", _mesh_text(mesh)
    for stage, layers in enumerate(topology.stages or ()):
        yield "stage", f"{stage}: layers {', '.join(map(str, layers))}"
    yield "samples", f"{trainer.consumed_samples}, tokens {trainer.consumed_tokens}"
    if trainer.best_step is not None:
        yield "best loss", f"{trainer.best_loss:g} at step {trainer.best_step}"
    if trainer.last_lr:
        yield "lr", ", ".join(f"{lr:g}" for lr in trainer.last_lr)
    for name, value in trainer.metrics.items():
        yield name, f"{value:g}"
    for name, value in manifest.notes.items():
        yield "note", f"{name}: {value!r}"
    software = manifest.software
    yield (
        "written by",
        f"dcp_resume {software.dcp_resume}, torch {software.torch}, python {software.python}",
    )


def _mesh_text(mesh: MeshEntry) -> str:
    axes = ", ".join(f"{axis}={size}" for axis, size in zip(mesh.axes, mesh.shape, strict=True))
    if mesh.ranks is None:
        return f"{mesh.id}: {axes}"
    shown = ", ".join(map(str, mesh.ranks[:_SHOWN_RANKS]))
    more = len(mesh.ranks) - _SHOWN_RANKS
    return f"{mesh.id}: {axes} on ranks {shown}" + (f" and {more} more" if more > 0 else "")


def _tree(entries: Sequence[TensorEntry], depth: int | None, level: int = 0) -> Iterator[list[str]]:
    """Rows of the entries that share their first ``level`` names, indented by level."""
    for name, group in groupby(_sorted(entries), key=lambda entry: _names(entry)[level]):
        branch = list(group)
        leaves = [entry for entry in branch if len(_names(entry)) == level + 1]
        label = "  " * level + name
        for entry in leaves:
            yield [label, *_cells(entry)]
        deeper = [entry for entry in branch if len(_names(entry)) > level + 1]
        if deeper:
            size = size_text(sum(map(_num_bytes, deeper)))
            yield [label, "", _count(deeper), "", "", size]
            if depth is None or level + 1 < depth:
                yield from _tree(deeper, depth, level + 1)


def _count(entries: Sequence[TensorEntry]) -> str:
    return f"{len(entries)} tensor{'' if len(entries) == 1 else 's'}"


def _names(entry: TensorEntry) -> list[str]:
    return entry.fqn.split(".")


def _sorted(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """In the order of names, layers by their number."""
    return sorted(
        entries,
        key=lambda e: [(n.isdecimal(), int(n) if n.isdecimal() else 0, n) for n in _names(e)],
    )


def _cells(entry: TensorEntry) -> list[str]:
    return [
        entry.dtype,
        "alias" if entry.alias_of else entry.kind,
        ", ".join(map(str, entry.global_shape)) or "scalar",
        " ".join(entry.placements or ("-",)),
        size_text(_num_bytes(entry)),
    ]


def _num_bytes(entry: TensorEntry) -> int:
    """Bytes of its own; an alias has none."""
    from dcp_resume.format.dtypes import ITEMSIZES

    return 0 if entry.alias_of else math.prod(entry.global_shape) * ITEMSIZES[entry.dtype]
