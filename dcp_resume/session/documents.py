"""The documents of one attempt: index, catalog and manifest, from the plan and the reports."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dcp_resume.errors import IncompletePlan
from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.digests import (
    DigestAlgorithm,
    choose_block_size,
    digest_bytes,
    digest_hex,
    fold,
)
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.index_check import check_structure
from dcp_resume.format.index_structure import IndexStructure
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.manifest.checks import checkpoint_problems
from dcp_resume.manifest.keys import CATALOG_NAME, INDEX_NAME, MANIFEST_NAME
from dcp_resume.manifest.models import (
    Catalog,
    Counts,
    DigestRule,
    DocumentRef,
    FileEntry,
    FormatMark,
    IndexRef,
    LeafEntry,
    Manifest,
    PartSummary,
    Software,
    TensorEntry,
    Topology,
    TrainerFacts,
)
from dcp_resume.manifest.signing import UNSIGNED, Signing
from dcp_resume.manifest.wire import encode
from dcp_resume.planning.flattening import part_of
from dcp_resume.planning.merge import GlobalPlan
from dcp_resume.problems import summarise
from dcp_resume.session.milestones import rank_times
from dcp_resume.session.tensor_digests import can_have_digest, with_digest
from dcp_resume.session.writing import RankReport

__all__ = [
    "AttemptIdentity",
    "Documents",
    "Facts",
    "FileTables",
    "build_documents",
    "file_entries",
    "planned_tables",
    "software",
    "tensor_digests",
]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the caller says of its training, for people and for the drift report."""

    trainer: TrainerFacts
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """Part → type and options of the optimizer whose state the part holds."""
    data: Mapping[str, Any] = field(default_factory=dict)
    precision: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """For people: shown, never compared."""
    stages: tuple[tuple[int, ...], ...] | None = None
    """Per pipeline stage the global layers it holds; None to tell by the layers' names."""
    virtual_stages: int = 1
    """Parts of the model on this rank; they are virtual stages if there are several ranks'."""


@dataclass(frozen=True, slots=True)
class AttemptIdentity:
    """Which attempt of which run."""

    run: str
    step: int
    attempt: str
    generation: int
    parent: int | None
    resume_source: int | None


@dataclass(frozen=True, slots=True)
class Documents:
    """The three documents as bytes, and what the commit record repeats."""

    manifest: Manifest
    catalog: Catalog
    index: ChunkIndex
    manifest_bytes: bytes
    catalog_bytes: bytes
    index_bytes: bytes


@dataclass(frozen=True, slots=True)
class FileTables:
    """Files and their chunks, as catalog and index list them."""

    files: tuple[FileEntry, ...]
    structure: IndexStructure
    """Of the chunks, by file and position."""
    digests: npt.NDArray[np.uint8]
    """``[N, 16]`` of the blocks."""


def planned_tables(
    plan: GlobalPlan, reports: Sequence[RankReport], algorithm: DigestAlgorithm
) -> FileTables:
    """The tables of a checkpoint that was written as planned.

    Args:
        plan: The merged plan.
        reports: One report a rank.
        algorithm: Of the digests.
    """
    layout = plan.layout
    return FileTables(
        file_entries(layout.names, layout.parts, layout.ranks.tolist(), reports, algorithm),
        layout.structure,
        np.concatenate([report.digests for report in reports]),
    )


def software() -> Software:
    """The versions that run here."""
    return Software(
        dcp_resume=version("dcp-resume"),
        torch=str(torch.__version__),
        python=platform.python_version(),
        numpy=np.__version__,
        cuda=torch.version.cuda or "",
    )


def build_documents(
    plan: GlobalPlan,
    tables: FileTables,
    reports: Sequence[RankReport],
    identity: AttemptIdentity,
    facts: Facts,
    block_size: int,
    late_values: Mapping[str, tuple[Any, Any]] = MappingProxyType({}),
    signing: Signing = UNSIGNED,
) -> Documents:
    """Describe what the ranks wrote.

    Args:
        plan: The merged plan.
        tables: Where its chunks lie.
        reports: One report a rank.
        identity: Which attempt.
        facts: What the caller says.
        block_size: Bytes of a digest block.
        late_values: FQN → path and encoded value of leaves that came with the reports.
        signing: Signs the manifest, and says which digests it rests on.

    Raises:
        IncompletePlan: Readers would refuse the checkpoint.
        InvalidDocument: A document would be larger than readers accept.
    """
    algorithm = DigestAlgorithm(signing.digest_algorithm)
    files = tables.files
    index = tables.structure.index.with_digests(tables.digests)
    index_bytes = index.to_bytes()
    catalog = _catalog(plan, reports, files)
    catalog_bytes = encode(catalog)
    stages = facts.stages or plan.stages
    manifest = Manifest(
        format=FormatMark(),
        run=identity.run,
        attempt=identity.attempt,
        step=identity.step,
        generation=identity.generation,
        parent=identity.parent,
        resume_source=identity.resume_source,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        topology=Topology(
            world_size=plan.world_size,
            meshes=plan.meshes,
            stages=stages,
            virtual_stages=facts.virtual_stages if stages else 1,
        ),
        trainer=facts.trainer,
        model=dict(facts.model),
        optimizer=dict(facts.optimizer),
        data=dict(facts.data),
        precision=dict(facts.precision),
        notes=dict(facts.notes),
        software=software(),
        leaves=tuple(
            LeafEntry(fqn=fqn, path=path, value=value)
            for fqn, (path, value) in {**plan.manifest_values, **late_values}.items()
        ),
        parts=_part_summaries(plan, files, late_values, algorithm),
        digest=DigestRule(algorithm=signing.digest_algorithm, block_size=block_size),
        counts=Counts(
            tensors=len(plan.tensors),
            chunks=len(index.chunk_tensor),
            boxes=len(index.box_ndim),
            blocks=len(tables.digests),
            files=len(files),
            num_bytes=sum(file.size for file in files),
        ),
        catalog=_reference(CATALOG_NAME, catalog_bytes, algorithm),
        chunk_index=_index_reference(index_bytes, algorithm),
    )
    _refuse_unreadable(manifest, catalog, tables)
    manifest_bytes = encode(manifest, partial(signing.sign, MANIFEST_NAME))
    return Documents(manifest, catalog, index, manifest_bytes, catalog_bytes, index_bytes)


def _catalog(
    plan: GlobalPlan, reports: Sequence[RankReport], files: tuple[FileEntry, ...]
) -> Catalog:
    sums = np.concatenate([report.position_sums for report in reports])
    return Catalog(
        format=FormatMark(),
        tensors=_with_tensor_digests(plan, sums),
        files=files,
        rank_times=rank_times([report.reached_us for report in reports]),
    )


def _with_tensor_digests(plan: GlobalPlan, sums: npt.NDArray[np.uint64]) -> tuple[TensorEntry, ...]:
    """The plan's entries, with the sums of their chunks where ranks reported them.

    Chunks tile their tensors, so the sums over them are those over all elements.
    """
    if not len(sums):
        return plan.tensors
    return tuple(
        with_digest(entry, digest) if can_have_digest(entry) else entry
        for entry, digest in zip(plan.tensors, tensor_digests(plan, sums), strict=True)
    )


def tensor_digests(plan: GlobalPlan, sums: npt.NDArray[np.uint64]) -> list[PositionDigest]:
    """Per tensor of the plan the sum over its chunks.

    Args:
        plan: What was written.
        sums: ``[chunks, 2]`` as ranks report them, in the order of the plan's files.
    """
    totals = np.zeros((len(plan.tensors), 2), np.uint64)
    np.add.at(totals, plan.layout.chunks.tensor, sums)
    return [PositionDigest(total, squares) for total, squares in totals.tolist()]


def _refuse_unreadable(manifest: Manifest, catalog: Catalog, tables: FileTables) -> None:
    """Hold the documents to what readers will: what nobody can open must not become a commit."""
    problems = checkpoint_problems(manifest, catalog, ITEMSIZES)
    problems = problems or check_structure(tables.structure, tables.digests, catalog, manifest)
    if problems:
        raise IncompletePlan(
            f"step {manifest.step} would be a checkpoint that no reader accepts; nothing was "
            f"committed:\n{summarise(problems)}",
            problems=tuple(problems),
        )


def file_entries(
    names: Sequence[str],
    parts: Sequence[str],
    ranks: Sequence[int],
    reports: Sequence[RankReport],
    algorithm: DigestAlgorithm,
) -> tuple[FileEntry, ...]:
    """Catalog entries of the files that ranks reported, in their order."""
    digests = np.concatenate([report.digests for report in reports])
    sizes = np.concatenate([report.sizes for report in reports]).tolist()
    headers = np.concatenate([report.header_sizes for report in reports]).tolist()
    num_blocks = np.concatenate([report.num_blocks for report in reports])
    ends = np.cumsum(num_blocks)
    return tuple(
        FileEntry(
            key=name,
            part=part,
            rank=rank,
            size=size,
            header_bytes=header,
            digest=fold(digests[start:end].tobytes(), algorithm),
        )
        for name, part, rank, size, header, start, end in zip(
            names,
            parts,
            ranks,
            sizes,
            headers,
            (ends - num_blocks).tolist(),
            ends.tolist(),
            strict=True,
        )
    )


def _part_summaries(
    plan: GlobalPlan,
    files: Sequence[FileEntry],
    late_values: Mapping[str, tuple[Any, Any]],
    algorithm: DigestAlgorithm,
) -> dict[str, PartSummary]:
    num_values = Counter(plan.num_values) + Counter(part_of(p) for p, _ in late_values.values())
    names = {entry.part for entry in plan.tensors} | set(num_values)
    summaries: dict[str, PartSummary] = {}
    for part in sorted(names):
        own = [file for file in files if file.part == part]
        summaries[part] = PartSummary(
            num_tensors=sum(t.part == part and t.codec == "raw" for t in plan.tensors),
            num_leaves=num_values[part],
            num_bytes=sum(file.size for file in own),
            digest=digest_hex("".join(file.digest for file in own).encode(), algorithm),
        )
    return summaries


def _reference(key: str, data: bytes, algorithm: DigestAlgorithm) -> DocumentRef:
    return DocumentRef(key=key, size=len(data), digest=digest_hex(data, algorithm))


def _index_reference(data: bytes, algorithm: DigestAlgorithm) -> IndexRef:
    block_size = max(choose_block_size(len(data)), 1 << 20)
    view = memoryview(data)
    blocks = [view[start : start + block_size] for start in range(0, len(data), block_size)]
    return IndexRef(
        key=INDEX_NAME,
        size=len(data),
        digest=digest_hex(data, algorithm),
        block_size=block_size,
        block_digests=tuple(digest_bytes([block], algorithm).hex() for block in blocks),
    )
