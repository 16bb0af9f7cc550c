"""The documents of one checkpoint: ``manifest.json`` and ``catalog.json``.

``docs/reference/format.md`` is the specification; its sentence stands under each field. Models are
frozen. Fields of a newer minor version are kept when a document is rewritten.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from dcp_resume.manifest.values import decode_value, encode_value

__all__ = [
    "Catalog",
    "Counts",
    "DigestRule",
    "DocumentRef",
    "FileEntry",
    "FormatMark",
    "IndexRef",
    "LeafEntry",
    "Manifest",
    "MeshEntry",
    "Padding",
    "PartSummary",
    "RankTimes",
    "Segment",
    "Software",
    "TensorDigest",
    "TensorEntry",
    "Topology",
    "TrainerFacts",
]

FORMAT_NAME = "dcp_resume"
FORMAT_MAJOR = 1
FORMAT_MINOR = 0
POSITION_SUMS = "position-sums-128"
"""The one algorithm of ``TensorDigest`` in version 1.0."""
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Features that this reader implements beyond version 1.0."""


def _decode_tagged(value: Any) -> Any:
    return decode_value(value, where="value")


def _encode_tagged(value: Any) -> Any:
    return encode_value(value, where="value")


Tagged = Annotated[Any, PlainValidator(_decode_tagged), PlainSerializer(_encode_tagged)]
"""A value under the tagging rules of ``manifest.values``."""


def _as_float(value: Any) -> float:
    number = decode_value(value, where="float")
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"expected a number, found {number!r}")
    try:
        return float(number)
    except OverflowError as error:  # pydantic would let it through
        raise ValueError("expected a number in the range of a float") from error


TaggedFloat = Annotated[float, PlainValidator(_as_float), PlainSerializer(_encode_tagged)]
"""A float that may be infinite or NaN, tagged so that JSON stays standard."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
PathKey = str | int | dict[str, Any]


class Document(BaseModel):
    """Base: frozen, unknown fields kept, no coercion between types."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ser_json_inf_nan="strings")


class FormatMark(Document):
    """Which reader a document needs."""

    name: str = FORMAT_NAME
    """MUST be ``dcp_resume``."""
    major: Count = FORMAT_MAJOR
    """A reader MUST refuse a major version it does not know."""
    minor: Count = FORMAT_MINOR
    """Minor versions only add optional fields."""
    requires: tuple[str, ...] = Field(default=(), strict=False)
    """Features without which it would be misread; unknown ones MUST be refused by name."""


DigestName = Literal["xxh3-128", "sha256-128"]


class DigestRule(Document):
    """How bytes are proved."""

    algorithm: DigestName = "xxh3-128"
    """Of every digest of the checkpoint. ``xxh3-128`` proves against accidents alone; a signed
    checkpoint has ``sha256-128``, the first 128 bits of SHA-256."""
    block_size: Annotated[int, Field(ge=2**16, le=2**24)]
    """Bytes of a block, a power of two."""


class DocumentRef(Document):
    """A file of the same attempt, proved by its exact bytes."""

    key: str
    """Relative to the directory of the manifest."""
    size: Count
    digest: str
    """``algorithm:hex`` over the exact bytes."""


class IndexRef(DocumentRef):
    """The chunk index, whose ranges can be proved alone."""

    block_size: Annotated[int, Field(ge=2**16, le=2**24)]
    block_digests: tuple[str, ...] = Field(strict=False)
    """Hex digest of each block of the index, in order."""


class MeshEntry(Document):
    """One device mesh; placements refer to it by id."""

    id: str
    axes: tuple[str, ...] = Field(strict=False)
    shape: tuple[Count, ...] = Field(strict=False)
    ranks: tuple[Count, ...] | None = Field(default=None, strict=False)
    """Global ranks in row-major order of the mesh; null for 0, 1, 2, …"""


class Topology(Document):
    """The arrangement of ranks that wrote the checkpoint."""

    world_size: Annotated[int, Field(ge=1)]
    meshes: tuple[MeshEntry, ...] = Field(default=(), strict=False)
    stages: tuple[tuple[Count, ...], ...] | None = Field(default=None, strict=False)
    """Per pipeline stage the global layers it held, or null without a pipeline."""
    virtual_stages: Annotated[int, Field(ge=1)] = 1


class TrainerFacts(Document):
    """What ``ls`` and a drift report show of the trainer."""

    step: Count
    """Optimizer steps completed."""
    epoch: Count = 0
    consumed_samples: Count = 0
    consumed_tokens: Count = 0
    best_loss: TaggedFloat = math.inf
    best_step: Count | None = None
    last_lr: tuple[TaggedFloat, ...] = Field(default=(), strict=False)
    """Learning rate per parameter group after the step."""
    metrics: dict[str, TaggedFloat] = Field(default_factory=dict)
    wall_time_s: TaggedFloat = 0.0
    """Seconds in training, over all incarnations of the run."""


class Software(Document):
    """Versions that wrote the checkpoint."""

    dcp_resume: str
    torch: str
    python: str
    numpy: str = ""
    cuda: str = ""
    """Version that torch was built for; empty without."""


class LeafEntry(Document):
    """One non-tensor leaf."""

    fqn: str
    path: tuple[PathKey, ...] = Field(strict=False)
    value: Any
    """Under the tagging rules; decoded by ``format.leaves``."""


class PartSummary(Document):
    """One separately loadable part of the state."""

    num_tensors: Count
    num_leaves: Count
    num_bytes: Count
    digest: str
    """Digest over the digests of the part's files, in catalog order."""


class Counts(Document):
    """Sizes a reader checks before it allocates."""

    tensors: Count
    chunks: Count
    boxes: Count
    blocks: Count
    files: Count
    num_bytes: Count
    """Bytes of all data files, headers included."""


class Manifest(Document):
    """``manifest.json``: the summary of one checkpoint, for people and for ``ls``; ≤ 256 KiB."""

    format: FormatMark
    run: str
    """UUID of the run; two runs MUST NOT share a root."""
    attempt: str
    step: Count
    generation: Count
    """Which incarnation of the run wrote it."""
    parent: Count | None
    """Log number of the newest commit at planning."""
    resume_source: Count | None
    """Log number of the commit that this incarnation resumed from."""
    created: str
    """RFC 3339, UTC."""
    topology: Topology
    trainer: TrainerFacts
    model: dict[str, Tagged] = Field(default_factory=dict)
    """Facts about the model, for the drift report."""
    optimizer: dict[str, Tagged] = Field(default_factory=dict)
    """Part → type and hyper-parameters of the optimizer whose state it holds."""
    data: dict[str, Tagged] = Field(default_factory=dict)
    """Which data and how it is batched, for the drift report."""
    precision: dict[str, Tagged] = Field(default_factory=dict)
    """Settings that change how sums round, for the drift report."""
    notes: dict[str, Tagged] = Field(default_factory=dict)
    """What the trainer says of the job that saved; shown, never compared."""
    software: Software
    leaves: tuple[LeafEntry, ...] = Field(default=(), strict=False)
    """Replicated non-tensor leaves, where they fit in 64 KiB together."""
    parts: dict[str, PartSummary]
    digest: DigestRule
    counts: Counts
    catalog: DocumentRef
    chunk_index: IndexRef


Kind = Literal["sharded", "replicated", "per_rank", "dp_sharded", "alias"]


class Segment(Document):
    """A run of rows that is sharded by itself, such as Q in a packed QKV."""

    name: str
    size: Count
    units: Count = 0
    """Pieces that cannot be split further, such as heads; of fewer than ranks, neighbours hold
    copies. 0: every row may be split from the next."""
    dim: Count = 0
    """The dimension that the segments divide."""


class Padding(Document):
    """Rows behind the logical end of a dimension."""

    dim: Count
    logical_size: Count


class TensorDigest(Document):
    """A digest of a whole tensor that does not depend on how it was cut."""

    algorithm: str
    """``position-sums-128``; a reader MUST pass over a digest by an algorithm it does not know."""
    value: str


class TensorEntry(Document):
    """One logical tensor. Boxes in the index decide where bytes lie; the rest describes."""

    fqn: str
    path: tuple[PathKey, ...] = Field(strict=False)
    """Key path in the state dict: strings for mapping keys, integers for positions,
    ``{"key": n}`` for a mapping key that is an integer."""
    part: str
    dtype: str
    """Name as in torch, without the prefix: ``bfloat16``."""
    global_shape: tuple[Count, ...] = Field(strict=False)
    kind: Kind
    codec: Literal["raw", "leaves"] = "raw"
    """``leaves``: a uint8 tensor that holds canonical JSON of non-tensor leaves."""
    mesh: str | None = None
    placements: tuple[str, ...] | None = Field(default=None, strict=False)
    """Per mesh axis ``R``, ``S(dim)`` or ``SS(dim,split_factor)``."""
    alias_of: str | None = None
    rule: dict[str, Count] = Field(default_factory=dict)
    """Logical sharding: mesh axis → tensor dim, also for axes of size 1."""
    layer: Count | None = None
    """Global index of the layer, where the name tells."""
    segments: tuple[Segment, ...] | None = Field(default=None, strict=False)
    padding: Padding | None = None
    composite: dict[str, Any] | None = None
    """Reserved for tensor subclasses; MUST be null in version 1."""
    tensor_digest: TensorDigest | None = None
    """Null if the save did not record it, and of kinds ``per_rank`` and ``alias``."""


class FileEntry(Document):
    """One data file."""

    base: str = "self"
    """``self``: the manifest's directory; else ``step-…/attempt`` of an ancestor, from the root."""
    key: str
    """Relative to the base."""
    part: str
    rank: Count
    """Rank that wrote it."""
    size: Count
    header_bytes: Count
    """Bytes before the first chunk."""
    digest: str
    """Digest over the file's block digests in order."""
    encoding: Literal["none"] = "none"


Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RankTimes(Document):
    """When each rank of a save got how far: seconds from its own call of ``save``, by rank."""

    planned_s: tuple[Seconds, ...] = Field(strict=False)
    """The ranks agreed on the plan. All learn it at once: who called last waited least."""
    staged_s: tuple[Seconds, ...] = Field(strict=False)
    """Its state was copied, and its trainer went on."""
    written_s: tuple[Seconds, ...] = Field(strict=False)
    """Its files were durable."""


class Catalog(Document):
    """``catalog.json``: the tables of tensors and files; O(tensors + files)."""

    format: FormatMark
    tensors: tuple[TensorEntry, ...] = Field(strict=False)
    """The chunk index refers to tensors by position."""
    files: tuple[FileEntry, ...] = Field(strict=False)
    """The chunk index refers to files by position."""
    rank_times: RankTimes | None = None
    """Null where they were not measured; for people, a load does not use them."""
