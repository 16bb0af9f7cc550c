"""Whether a manifest and its catalog make sense together: integers and strings, no I/O.

Models check fields; this module checks what fields say of each other. Each function yields every
problem that it finds. The chunk index has its own checks in ``format.chunk_index``.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from dcp_resume.errors import Problem
from dcp_resume.manifest.keys import (
    CATALOG_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    attempt_prefix,
    is_relative_key,
    parse_attempt_prefix,
)
from dcp_resume.manifest.models import (
    POSITION_SUMS,
    Catalog,
    DocumentRef,
    FileEntry,
    Manifest,
    MeshEntry,
    RankTimes,
    TensorEntry,
)
from dcp_resume.manifest.wire import MAX_CATALOG_BYTES, MAX_INDEX_BYTES

__all__ = ["catalog_problems", "checkpoint_problems", "manifest_problems", "name_problems"]

MAX_FQN_BYTES = 4096
MAX_TENSOR_BYTES = 2**63 - 1
MAX_HEADER_BYTES = 8 + 100_000_000
"""Bytes before the first chunk of a data file."""
MAX_LEAVES_BYTES = 2**30
"""Bytes of a tensor that holds packed leaves: a reader takes it into memory whole."""

_BLOCK_DIGEST = re.compile(r"[0-9a-f]{32}")
_PLACEMENT = re.compile(r"R|S\((\d{1,4})\)|SS\((\d{1,4}),[1-9]\d{0,9}\)")
_RESERVED_FQN = "__metadata__"
_T = TypeVar("_T", bound=Hashable)


def checkpoint_problems(
    manifest: Manifest, catalog: Catalog, itemsizes: Mapping[str, int]
) -> list[Problem]:
    """Every problem of the two documents of one checkpoint.

    Args:
        manifest: The summary.
        catalog: The tables that it refers to.
        itemsizes: Known dtype names, and the bytes of one element.
    """
    return [*manifest_problems(manifest), *catalog_problems(manifest, catalog, itemsizes)]


def manifest_problems(manifest: Manifest) -> Iterator[Problem]:
    """Problems of a manifest by itself."""
    where = MANIFEST_NAME
    if not _is_attempt(manifest.step, manifest.attempt):
        message = f"expected 1 to 32 of [a-z0-9], found {manifest.attempt!r:.80}"
        yield Problem(f"{where}:attempt", "attempt", message)
    yield from _block_size_problem(f"{where}:digest.block_size", manifest.digest.block_size)
    algorithm = manifest.digest.algorithm
    for name, document, usual_key in (
        ("catalog", manifest.catalog, CATALOG_NAME),
        ("chunk_index", manifest.chunk_index, INDEX_NAME),
    ):
        yield from _document_problems(f"{where}:{name}", document, usual_key)
        yield from _digest_problem(f"{where}:{name}.digest", document.digest, algorithm)
    for name, reference, limit in (
        ("catalog", manifest.catalog, MAX_CATALOG_BYTES),
        ("chunk_index", manifest.chunk_index, MAX_INDEX_BYTES),
    ):
        if reference.size > limit:
            message = f"expected at most {limit} bytes, found {reference.size}"
            yield Problem(f"{where}:{name}.size", "too_large", message)
    yield from _index_problems(f"{where}:chunk_index", manifest)
    for name, part in manifest.parts.items():
        yield from _digest_problem(f"{where}:parts.{name}.digest", part.digest, algorithm)
    for name, facts in manifest.optimizer.items():
        if not isinstance(facts, Mapping):
            message = f"expected type and options, found {reprlib.repr(facts)}"
            yield Problem(f"{where}:optimizer.{name}", "facts", message)
    yield from _mesh_problems(manifest)
    yield from name_problems((leaf.fqn for leaf in manifest.leaves), f"{where}:leaves")
    for number, leaf in enumerate(manifest.leaves):
        yield from _path_problems(f"{where}:leaves[{number}]", leaf.path)


def catalog_problems(
    manifest: Manifest, catalog: Catalog, itemsizes: Mapping[str, int]
) -> Iterator[Problem]:
    """Problems of a catalog, by itself and against its manifest."""
    yield from _count_problems(manifest, catalog)
    meshes = {mesh.id: mesh for mesh in manifest.topology.meshes}
    yield from name_problems((entry.fqn for entry in catalog.tensors), f"{CATALOG_NAME}:tensors")
    for number, tensor in enumerate(catalog.tensors):
        where = f"{CATALOG_NAME}:tensors[{number}]"
        yield from _part_problem(where, tensor.part, manifest)
        yield from _path_problems(where, tensor.path)
        yield from _size_problems(where, tensor, itemsizes)
        yield from _placement_problems(where, tensor, meshes)
        yield from _shape_note_problems(where, tensor)
    yield from _alias_problems(catalog.tensors)
    own_base = f"step-{manifest.step:08d}/{manifest.attempt}"
    for number, file in enumerate(catalog.files):
        where = f"{CATALOG_NAME}:files[{number}]"
        yield from _part_problem(where, file.part, manifest)
        yield from _file_problems(where, file, own_base)
        yield from _digest_problem(f"{where}.digest", file.digest, manifest.digest.algorithm)
    yield from _same_file_problems(catalog.files)
    if catalog.rank_times is not None:
        yield from _rank_times_problems(catalog.rank_times, manifest.topology.world_size)


def name_problems(fqns: Iterable[str], where: str) -> Iterator[Problem]:
    """Problems of a table's FQNs: length, reserved and unstorable names, duplicates."""
    first: dict[str, int] = {}
    for number, fqn in enumerate(fqns):
        place = f"{where}[{number}].fqn"
        if len(fqn) > MAX_FQN_BYTES or len(fqn.encode("utf-8")) > MAX_FQN_BYTES:
            yield Problem(place, "fqn_length", f"expected at most {MAX_FQN_BYTES} bytes of UTF-8")
        if fqn == _RESERVED_FQN:
            yield Problem(place, "fqn_reserved", "safetensors keeps this name for itself")
        if "\0" in fqn:
            yield Problem(place, "fqn_nul", f"a NUL character in {fqn!r:.80}")
        earlier = first.setdefault(fqn, number)
        if earlier != number:
            yield Problem(place, "duplicate", f"{fqn!r:.80} is entry {earlier} already")


def _is_attempt(step: int, attempt: str) -> bool:
    try:
        attempt_prefix(step, attempt)
    except ValueError:
        return False
    return True


def _block_size_problem(where: str, size: int) -> Iterator[Problem]:
    if size.bit_count() != 1:
        yield Problem(where, "block_size", f"expected a power of two, found {size}")


def _digest_problem(where: str, digest: str, algorithm: str) -> Iterator[Problem]:
    name, _, digits = digest.partition(":")
    if name != algorithm or _BLOCK_DIGEST.fullmatch(digits) is None:
        message = f"expected '{algorithm}:' and 32 hex digits, found {digest!r:.80}"
        yield Problem(where, "digest_form", message)


def _document_problems(where: str, document: DocumentRef, name: str) -> Iterator[Problem]:
    if not is_relative_key(document.key):
        yield _escape(f"{where}.key", document.key)
    elif document.key == MANIFEST_NAME:
        yield Problem(f"{where}.key", "duplicate", f"expected a key such as {name!r}, not our own")


def _index_problems(where: str, manifest: Manifest) -> Iterator[Problem]:
    index = manifest.chunk_index
    if index.key == manifest.catalog.key:
        yield Problem(f"{where}.key", "duplicate", f"{index.key!r:.80} is the catalog's key")
    yield from _block_size_problem(f"{where}.block_size", index.block_size)
    expected = -(-index.size // index.block_size)
    if len(index.block_digests) != expected:
        message = f"expected {expected} of {index.size} bytes, found {len(index.block_digests)}"
        yield Problem(f"{where}.block_digests", "count", message)
    for number, digest in enumerate(index.block_digests):
        if _BLOCK_DIGEST.fullmatch(digest) is None:
            message = f"expected 32 hex digits, found {digest!r:.80}"
            yield Problem(f"{where}.block_digests[{number}]", "digest_form", message)


def _mesh_problems(manifest: Manifest) -> Iterator[Problem]:
    topology = manifest.topology
    where = f"{MANIFEST_NAME}:topology.meshes"
    for twice in _repeated(mesh.id for mesh in topology.meshes):
        yield Problem(where, "duplicate", f"mesh id {twice!r:.80} is given more than once")
    for number, mesh in enumerate(topology.meshes):
        place = f"{where}[{number}]"
        if len(mesh.axes) != len(mesh.shape):
            message = f"{len(mesh.axes)} axes but {len(mesh.shape)} sizes"
            yield Problem(f"{place}.shape", "count", message)
        for twice in _repeated(mesh.axes):
            yield Problem(f"{place}.axes", "duplicate", f"axis {twice!r:.80} appears twice")
        if mesh.ranks is not None:
            yield from _rank_problems(place, mesh, mesh.ranks, topology.world_size)


def _rank_problems(
    where: str, mesh: MeshEntry, ranks: tuple[int, ...], world_size: int
) -> Iterator[Problem]:
    if _product(mesh.shape) != len(ranks):
        message = f"shape {mesh.shape!s:.80} needs another number of ranks than {len(ranks)}"
        yield Problem(f"{where}.ranks", "count", message)
    if max(ranks, default=0) >= world_size:
        message = f"expected ranks below {world_size}, found {max(ranks)}"
        yield Problem(f"{where}.ranks", "range", message)


def _rank_times_problems(times: RankTimes, world_size: int) -> Iterator[Problem]:
    for name in ("planned_s", "staged_s", "written_s"):
        found = len(getattr(times, name))
        if found != world_size:
            message = f"expected one time for each of {world_size} ranks, found {found}"
            yield Problem(f"{CATALOG_NAME}:rank_times.{name}", "rank_times", message)


def _count_problems(manifest: Manifest, catalog: Catalog) -> Iterator[Problem]:
    counts = manifest.counts
    for name, said, found in (
        ("tensors", counts.tensors, len(catalog.tensors)),
        ("files", counts.files, len(catalog.files)),
        ("num_bytes", counts.num_bytes, sum(file.size for file in catalog.files)),
    ):
        if said != found:
            message = f"the manifest says {said}, the catalog holds {found}"
            yield Problem(f"{MANIFEST_NAME}:counts.{name}", "count", message)


def _part_problem(where: str, part: str, manifest: Manifest) -> Iterator[Problem]:
    if part not in manifest.parts:
        message = f"part {part!r:.80} is not among the manifest's {len(manifest.parts)}"
        yield Problem(f"{where}.part", "dangling", message)


def _size_problems(
    where: str, tensor: TensorEntry, itemsizes: Mapping[str, int]
) -> Iterator[Problem]:
    itemsize = itemsizes.get(tensor.dtype)
    if itemsize is None:
        yield Problem(f"{where}.dtype", "dtype", f"unknown dtype {tensor.dtype!r:.80}")
    if _product(tensor.global_shape, itemsize or 1) > MAX_TENSOR_BYTES:
        message = f"{tensor.fqn!r:.80} would have more than {MAX_TENSOR_BYTES} bytes"
        yield Problem(f"{where}.global_shape", "too_large", message)
    if tensor.codec == "leaves" and (
        tensor.dtype != "uint8" or _product(tensor.global_shape) > MAX_LEAVES_BYTES
    ):
        message = f"expected at most {MAX_LEAVES_BYTES} of uint8, as packed leaves are"
        yield Problem(f"{where}.codec", "leaves", message)


def _path_problems(where: str, path: Sequence[object]) -> Iterator[Problem]:
    is_path = path and all(
        type(key) in (str, int)
        or (isinstance(key, dict) and set(key) == {"key"} and type(key["key"]) is int)
        for key in path
    )
    if not is_path:
        message = f"expected names, positions and {{'key': n}}, found {reprlib.repr(path)}"
        yield Problem(f"{where}.path", "path", message)


def _product(sizes: Sequence[int], first: int = 1) -> int:
    """The product, or something above ``MAX_TENSOR_BYTES`` as soon as it is known to be that."""
    product = 0 if 0 in sizes else first
    for size in sizes:
        product *= size
        if product > MAX_TENSOR_BYTES:
            break  # a hostile shape could keep big integers busy for hours
    return product


def _placement_problems(
    where: str, tensor: TensorEntry, meshes: Mapping[str, MeshEntry]
) -> Iterator[Problem]:
    placements = tensor.placements
    if tensor.mesh is None:
        if placements is not None:
            yield Problem(f"{where}.placements", "dangling", "placements without a mesh")
        return
    mesh = meshes.get(tensor.mesh)
    if mesh is None:
        message = f"mesh {tensor.mesh!r:.80} is not among the manifest's"
        yield Problem(f"{where}.mesh", "dangling", message)
    elif placements is not None and len(placements) != len(mesh.axes):
        message = f"expected one for each of {len(mesh.axes)} axes, found {len(placements)}"
        yield Problem(f"{where}.placements", "count", message)
    for placement in placements or ():
        match = _PLACEMENT.fullmatch(placement)
        dim = int(match[1] or match[2] or -1) if match else len(tensor.global_shape)
        if dim >= len(tensor.global_shape):
            message = f"{placement!r:.80} does not fit {len(tensor.global_shape)} dimensions"
            yield Problem(f"{where}.placements", "placement", message)


def _shape_note_problems(where: str, tensor: TensorEntry) -> Iterator[Problem]:
    num_dims = len(tensor.global_shape)
    for axis, dim in tensor.rule.items():
        if dim >= num_dims:
            message = f"axis {axis!r:.80}: expected a dimension below {num_dims}, found {dim}"
            yield Problem(f"{where}.rule", "range", message)
    padding = tensor.padding
    if padding is not None and (
        padding.dim >= num_dims or padding.logical_size > tensor.global_shape[padding.dim]
    ):
        message = f"does not fit shape {tensor.global_shape!s:.80}"
        yield Problem(f"{where}.padding", "range", message)
    digest = tensor.tensor_digest
    is_ours = digest is not None and digest.algorithm == POSITION_SUMS
    if digest is not None and is_ours and _BLOCK_DIGEST.fullmatch(digest.value) is None:
        message = f"expected 32 hex digits, found {digest.value!r:.80}"
        yield Problem(f"{where}.tensor_digest.value", "digest_form", message)
    if tensor.composite is not None:
        yield Problem(f"{where}.composite", "composite", "expected null in version 1")


def _alias_problems(tensors: Sequence[TensorEntry]) -> Iterator[Problem]:
    by_fqn = {tensor.fqn: tensor for tensor in tensors}
    for number, tensor in enumerate(tensors):
        where = f"{CATALOG_NAME}:tensors[{number}].alias_of"
        if (tensor.kind == "alias") != (tensor.alias_of is not None):
            message = f"kind {tensor.kind!r} with alias_of {tensor.alias_of!r:.80}"
            yield Problem(where, "alias", message)
        if tensor.alias_of is None:
            continue
        target = by_fqn.get(tensor.alias_of)
        if target is None:
            message = f"{tensor.alias_of!r:.80} is not in the catalog"
            yield Problem(where, "alias_dangling", message)
        elif target.alias_of is not None:
            # Chains are refused whole, so that no reader needs to guard against cycles.
            is_cycle = target.alias_of == tensor.fqn or target.fqn == tensor.fqn
            message = f"{tensor.alias_of!r:.80} is an alias itself"
            yield Problem(where, "alias_cycle" if is_cycle else "alias_chain", message)
        elif (target.dtype, target.global_shape) != (tensor.dtype, tensor.global_shape):
            message = (
                f"{tensor.dtype} {tensor.global_shape!s:.80} cannot share the storage of "
                f"{target.dtype} {target.global_shape!s:.80}"
            )
            yield Problem(where, "alias_mismatch", message)


def _file_problems(where: str, file: FileEntry, own_base: str) -> Iterator[Problem]:
    if not is_relative_key(file.key):
        yield _escape(f"{where}.key", file.key)
    elif file.key in (MANIFEST_NAME, CATALOG_NAME, INDEX_NAME):
        yield Problem(f"{where}.key", "duplicate", f"{file.key!r} is a document, not a data file")
    if file.base == own_base:
        message = "expected 'self' for the directory of the manifest"
        yield Problem(f"{where}.base", "base", message)
    elif file.base != "self" and not _is_base(file.base):
        message = f"expected 'self' or 'step-<number>/<attempt>', found {file.base!r:.120}"
        yield Problem(f"{where}.base", "base", message)
    if file.header_bytes > file.size:
        message = f"{file.header_bytes} bytes of header in a file of {file.size}"
        yield Problem(f"{where}.header_bytes", "range", message)
    if file.header_bytes > MAX_HEADER_BYTES:
        message = f"expected at most {MAX_HEADER_BYTES} bytes, found {file.header_bytes}"
        yield Problem(f"{where}.header_bytes", "too_large", message)


def _is_base(base: str) -> bool:
    parsed = parse_attempt_prefix(f"{base}/")
    return parsed is not None and attempt_prefix(*parsed) == f"{base}/"


def _same_file_problems(files: Sequence[FileEntry]) -> Iterator[Problem]:
    first: dict[tuple[str, str], int] = {}
    for number, file in enumerate(files):
        earlier = first.setdefault((file.base.casefold(), file.key.casefold()), number)
        if earlier != number:
            message = f"{file.key!r:.80} is file {earlier} already (upper and lower case are one)"
            yield Problem(f"{CATALOG_NAME}:files[{number}].key", "duplicate", message)


def _repeated(names: Iterable[_T]) -> list[_T]:
    return [name for name, count in Counter(names).items() if count > 1]


def _escape(where: str, key: str) -> Problem:
    message = f"expected lower-case names below the manifest's directory, found {key!r:.120}"
    return Problem(where, "path_escape", message)
