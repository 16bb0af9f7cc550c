"""The chunk index: literal bytes, what is derived, and what a check refuses."""

import dataclasses
import math
import re

import numpy as np
import pytest

from dcp_resume.errors import InvalidDocument
from dcp_resume.format.chunk_index import UNUSED, ChunkIndex
from dcp_resume.format.columns import pack_columns
from dcp_resume.format.digests import BlockRule, fold
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.format.index_check import check_index
from dcp_resume.manifest.models import Catalog, FileEntry, Manifest, TensorEntry

BLOCK = 2**16


@dataclasses.dataclass
class Checkpoint:
    """An index with the documents it belongs to."""

    index: ChunkIndex
    catalog: Catalog
    manifest: Manifest

    def problems(self):
        return check_index(self.index, self.catalog, self.manifest)

    def with_index(self, **columns):
        return dataclasses.replace(self, index=dataclasses.replace(self.index, **columns))

    def with_tensor(self, number, **fields):
        tensors = list(self.catalog.tensors)
        tensors[number] = tensors[number].model_copy(update=fields)
        catalog = self.catalog.model_copy(update={"tensors": tuple(tensors)})
        return dataclasses.replace(self, catalog=catalog)

    def with_file(self, number, **fields):
        files = list(self.catalog.files)
        files[number] = files[number].model_copy(update=fields)
        catalog = self.catalog.model_copy(update={"files": tuple(files)})
        return dataclasses.replace(self, catalog=catalog)


def checkpoint(tensors, files, base="self"):
    """Build documents that agree.

    Args:
        tensors: (fqn, dtype, shape, kind) of each.
        files: Per file its chunks: (tensor, offsets, sizes).
    """
    depth = max([1, *(len(shape) for _, _, shape, _ in tensors)])
    flat = [chunk for chunks in files for chunk in chunks]
    offsets = np.array([[*o, *[0] * (depth - len(o))] for _, o, _ in flat]).reshape(-1, depth)
    sizes = np.array([[*s, *[1] * (depth - len(s))] for _, _, s in flat]).reshape(-1, depth)
    itemsize = [ITEMSIZES[dtype] for _, dtype, _, _ in tensors] + [1]
    length = np.array([math.prod(s) * itemsize[min(t, len(tensors))] for t, _, s in flat], np.int64)
    counts = np.array([len(chunks) for chunks in files])
    headers = np.full(len(files), 128)
    blocks = BlockRule(BLOCK).cut(headers, counts, length)
    digests = np.arange(16 * len(blocks.starts), dtype=np.uint64).astype(np.uint8).reshape(-1, 16)
    index = ChunkIndex.build(
        counts, [t for t, _, _ in flat], offsets, sizes, [len(s) for _, _, s, _ in tensors], digests
    )
    entries = [
        FileEntry(
            base=base, key=f"f{n}.safetensors", part="model", rank=n, size=int(blocks.sizes[n]),
            header_bytes=128,
            digest=fold(digests[blocks.first[n] : blocks.first[n + 1]].tobytes()),
        )
        for n in range(len(files))
    ]  # fmt: skip
    names = [
        TensorEntry(fqn=f, path=(f,), part="model", dtype=d, global_shape=s, kind=k)
        for f, d, s, k in tensors
    ]
    said = {
        "tensors": len(tensors), "chunks": len(flat), "boxes": len(index.box_ndim),
        "blocks": len(digests), "files": len(files), "num_bytes": int(blocks.sizes.sum()),
    }  # fmt: skip
    reference = {"key": "x", "size": 0, "digest": ""}
    manifest = Manifest.model_validate(
        {
            "format": {}, "run": "r", "attempt": "a", "step": 1, "generation": 1, "parent": None,
            "resume_source": None, "created": "", "topology": {"world_size": 1},
            "trainer": {"step": 1}, "parts": {}, "digest": {"block_size": BLOCK},
            "software": {"dcp_resume": "", "torch": "", "python": ""}, "counts": said,
            "catalog": reference,
            "chunk_index": {**reference, "block_size": BLOCK, "block_digests": []},
        }
    )  # fmt: skip
    catalog = Catalog.model_validate({"format": {}, "tensors": names, "files": entries})
    return Checkpoint(index, catalog, manifest)


def small():
    return checkpoint(
        [
            ("w", "float32", (4, 300), "sharded"),
            ("tied", "float32", (4, 300), "alias"),
            ("step", "float32", (), "replicated"),
            ("big", "int64", (20_000,), "dp_sharded"),
            ("empty", "int8", (0, 5), "replicated"),
        ],
        [
            [(3, (0,), (12_000,)), (0, (0, 0), (2, 300)), (2, (), ()), (4, (0, 0), (0, 5))],
            [(3, (12_000,), (8_000,)), (0, (2, 0), (2, 300))],
            [],
        ],
    )


def test_literal_index():
    index = ChunkIndex.build(
        [2, 0],
        [1, 0],
        np.array([[4, 0], [0, 0]]),
        np.array([[2, 3], [5, 1]]),
        [1, 2],
        np.arange(16, dtype=np.uint8),
    )
    header = (
        b'{"columns":[{"dtype":"u8","name":"box_values","shape":[6]},'
        b'{"dtype":"u4","name":"chunk_box","shape":[2]},'
        b'{"dtype":"u4","name":"chunk_tensor","shape":[2]},'
        b'{"dtype":"u4","name":"file_chunk_count","shape":[2]},'
        b'{"dtype":"u1","name":"block_digest","shape":[1,16]},'
        b'{"dtype":"u1","name":"box_ndim","shape":[2]}],"meta":{}}'
    )
    box_values = b"".join(n.to_bytes(8, "little") for n in (0, 5, 4, 0, 2, 3))
    narrow = b"".join(n.to_bytes(4, "little") for n in (1, 0, 1, 0, 2, 0))
    body = box_values + narrow + bytes(range(16)) + b"\x01\x02"
    expected = b"DCPRIDX1" + (368).to_bytes(8, "little") + header.ljust(368) + body
    assert index.to_bytes() == expected
    again = ChunkIndex.from_bytes(expected, "chunk-index")
    assert again.chunk_offsets.tolist() == [[4, 0], [0, 0]]
    assert again.chunk_sizes.tolist() == [[2, 3], [5, 1]]


def test_places_and_blocks_are_derived():
    case = small()
    index, itemsizes, headers = case.index, [4, 4, 4, 8, 1], [128, 128, 128]
    assert case.problems() == []
    assert index.chunk_bytes(itemsizes).tolist() == [96_000, 2400, 4, 0, 64_000, 2400]
    begins = index.chunk_begin(itemsizes, headers)
    assert begins.tolist() == [128, 96_128, 98_528, 98_532, 128, 64_128]
    assert index.file_bounds(1) == (4, 6)
    assert [index.chunks_of(t).tolist() for t in range(5)] == [[1, 5], [], [2], [0, 4], [3]]
    blocks = index.blocks(itemsizes, headers, BLOCK)
    assert blocks.bounds(0).tolist() == [0, 128, 128 + BLOCK, 96_128, 98_532]
    assert blocks.bounds(1).tolist() == [0, 128, 128 + BLOCK, 66_528]
    assert blocks.bounds(2).tolist() == [0, 128]
    assert blocks.first.tolist() == [0, 4, 7, 8]
    where = [index.tensors_in_block(0, block, blocks=blocks, begins=begins) for block in range(4)]
    assert where == [[], [3], [3], [0, 2]]
    assert index.tensors_in_block(1, 1, blocks=blocks, begins=begins) == [0, 3]


def test_chunks_may_name_boxes_by_number():
    counts, tensors, ndims = [3, 2], [0, 1, 2, 0, 1], [1, 2, 2]
    offsets, sizes = np.array([[4, 0], [9, 9], [0, 0]]), np.array([[2, 1], [9, 9], [3, 1]])
    box, digests = np.array([0, 2, 0, 2, 0]), np.zeros((4, 16), np.uint8)
    by_number = ChunkIndex.build(counts, tensors, offsets, sizes, ndims, digests, box)
    spelt_out = ChunkIndex.build(counts, tensors, offsets[box], sizes[box], ndims, digests)
    assert by_number.to_bytes() == spelt_out.to_bytes()
    # A box that no chunk has is not listed; one of two numbers of dimensions is, twice.
    assert by_number.box_ndim.tolist() == [1, 1, 2, 2]
    assert by_number.chunk_offsets.tolist() == [[4, 0], [0, 0], [4, 0], [0, 0], [4, 0]]


def test_an_empty_checkpoint():
    case = checkpoint([], [])
    assert case.problems() == []
    index = ChunkIndex.from_bytes(case.index.to_bytes(), "i")
    assert index.chunks_of(0).tolist() == []
    assert index.chunk_begin([], []).tolist() == []


def test_a_file_of_an_ancestor_may_hold_unused_chunks():
    tensors = [("w", "int8", (4,), "sharded")]
    files = [[(UNUSED, (0,), (70_000,)), (0, (0,), (4,))]]
    case = checkpoint(tensors, files, base="step-00000001/abc")
    assert case.problems() == []
    begins = case.index.chunk_begin([1], [128])
    assert begins.tolist() == [128, 70_128]
    blocks = case.index.blocks([1], [128], BLOCK)
    assert case.index.tensors_in_block(0, 1, blocks=blocks, begins=begins) == []
    assert [p.kind for p in checkpoint(tensors, files).problems()] == ["unused"]


def with_box(case, chunk, offsets, sizes):
    """The same with one chunk's box replaced."""
    index = case.index
    all_offsets, all_sizes = index.chunk_offsets.copy(), index.chunk_sizes.copy()
    all_offsets[chunk, : len(offsets)], all_sizes[chunk, : len(sizes)] = offsets, sizes
    built = ChunkIndex.build(
        index.file_chunk_count, index.chunk_tensor, all_offsets, all_sizes,
        [len(t.global_shape) for t in case.catalog.tensors], index.block_digest,
    )  # fmt: skip
    counts = case.manifest.counts.model_copy(update={"boxes": len(built.box_ndim)})
    manifest = case.manifest.model_copy(update={"counts": counts})
    return dataclasses.replace(case, index=built, manifest=manifest)


FAULTS = [
    (lambda c: c.with_index(block_digest=c.index.block_digest[1:]), {"count"}, "blocks"),
    (lambda c: c.with_index(chunk_tensor=np.array([9, 0, 2, 4, 3, 0], "u4")), {"id"}, r"chunk 0 "),
    (lambda c: c.with_index(chunk_tensor=np.array([3, 1, 2, 4, 3, 0], "u4")), {"alias"}, "tied"),
    (lambda c: c.with_index(chunk_tensor=np.array([0, 0, 2, 4, 3, 0], "u4")), {"ndim"}, "^w: "),
    (lambda c: c.with_tensor(0, dtype="qint8"), {"tensor"}, "^w: .*dtype"),
    (lambda c: c.with_tensor(3, global_shape=(2**61,)), {"tensor"}, "^big: .*more than"),
    (lambda c: c.with_tensor(2, global_shape=(1,) * 33), {"tensor"}, "33 dimensions"),
    (lambda c: with_box(c, 1, (3, 0), (2, 300)), {"bounds"}, r"^w: chunk 1 \(in f0"),
    (lambda c: with_box(c, 1, (2**62, 0), (2**62 + 2, 300)), {"bounds"}, "^w: chunk 1"),
    (lambda c: c.with_file(0, size=98_533), {"size"}, "f0.safetensors: is 98533"),
    (lambda c: c.with_file(0, size=2**63 - 1), {"size"}, "more than"),
    (lambda c: c.with_file(1, digest=fold(b"")), {"digest"}, "f1.safetensors"),
    (lambda c: with_box(c, 1, (2, 0), (2, 300)), {"overlap"}, r"^w: chunk 1 .*and chunk 5 \(in f1"),
    (lambda c: c.with_tensor(0, global_shape=(5, 300)), {"hole"}, "^w: its chunks hold 1200"),
    (lambda c: c.with_tensor(4, global_shape=(1, 5)), {"hole"}, "^empty: its chunks hold 0"),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "kinds", "text"), FAULTS)
def test_faults_are_found_and_named(break_it, kinds, text):
    problems = break_it(small()).problems()
    assert {problem.kind for problem in problems} == kinds
    assert re.search(text, str(problems[0])), problems


ALIKE = [
    ("a", "int8", (4,), "sharded"),
    ("b", "int8", (4,), "sharded"),
    ("c", "int8", (4,), "sharded"),
    ("other", "int8", (2, 2), "sharded"),
]


@pytest.mark.parametrize(
    ("boxes_of_c", "wrong"),
    [
        ([((0,), (2,)), ((2,), (2,))], set()),
        ([((0,), (2,)), ((1,), (2,))], {("c", "overlap")}),
        ([((0,), (2,)), ((0,), (2,))], {("c", "overlap")}),
        ([((0,), (2,))], {("c", "hole")}),
        ([], {("c", "hole")}),
        ([((0,), (4,)), ((4,), (2,))], {("c", "bounds")}),
    ],
)
def test_a_tensor_unlike_those_of_its_shape_is_found(boxes_of_c, wrong):
    files = [
        [(t, (start,), (2,)) for t in (0, 1) for start in (0, 2)],
        [(2, *box) for box in boxes_of_c] + [(3, (0, 0), (2, 2))],
    ]
    problems = checkpoint(ALIKE, files).problems()
    assert {(problem.where, problem.kind) for problem in problems} == wrong


def test_what_is_wrong_with_tensors_that_are_alike_is_said_of_each():
    overlapping = [((0,), (3,)), ((2,), (1,))]
    files = [[(t, *box) for t in range(3) for box in overlapping] + [(3, (0, 0), (2, 2))]]
    problems = checkpoint(ALIKE, files).problems()
    assert [(problem.where, problem.kind) for problem in problems] == [
        (name, "overlap") for name in "abc"
    ]
    assert "chunk 4 (in f0)" in str(problems[2]).replace(".safetensors", "")


def test_a_tensor_without_chunks_is_not_taken_for_an_alias_of_its_shape():
    tensors = [("tied", "int8", (4,), "alias"), ("w", "int8", (4,), "sharded")]
    (problem,) = checkpoint(tensors, [[]]).problems()
    assert (problem.where, problem.kind) == ("w", "hole")


def test_blocks_must_be_as_many_as_the_rule_makes():
    case = small()
    counts = case.manifest.counts
    for digests in (
        case.index.block_digest[:-1],
        np.zeros((9, 16), np.uint8),
        np.zeros((0, 16), "u1"),
    ):
        said = counts.model_copy(update={"blocks": len(digests)})
        other = dataclasses.replace(
            case.with_index(block_digest=digests),
            manifest=case.manifest.model_copy(update={"counts": said}),
        )
        assert [p.kind for p in other.problems()] == ["blocks"]


def test_many_faults_are_counted_not_listed():
    case = checkpoint([("w", "int8", (1,), "sharded")], [[(0, (0,), (1,))] * 100])
    problems = case.with_index(chunk_tensor=np.full(100, 7, "u4")).problems()
    assert len(problems) == 51
    assert "50 more chunks" in str(problems[-1])


HOSTILE = {
    "chunk_box": np.array([0, 1, 2, 3, 4, 99], "u4"),
    "chunk_tensor": np.zeros(5, "u4"),
    "file_chunk_count": np.full(3, 2**32 - 1, "u4"),
    "box_ndim": np.full(6, 255, "u1"),
    "box_values": np.zeros(3, "u8"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_columns_that_contradict_each_other_are_refused(name):
    index = dataclasses.replace(small().index, **{name: HOSTILE[name]})
    with pytest.raises(InvalidDocument):
        ChunkIndex.from_bytes(index.to_bytes(), "i")


@pytest.mark.parametrize(
    ("ndim", "values", "boxes"),
    [
        ([33], [0] * 66, [0]),
        ([0, 0], [], [0, 1]),
        ([1], [0, 2**63], [0]),
        ([1, 1], [0, 1, 0, 2], [0]),
    ],
)
def test_hostile_box_tables_are_refused(ndim, values, boxes):
    index = ChunkIndex(
        np.array([len(boxes)], "u4"), np.zeros(len(boxes), "u4"), np.array(boxes, "u4"),
        np.array(ndim, "u1"), np.array(values, "u8"), np.zeros((0, 16), "u1"),
    )  # fmt: skip
    with pytest.raises(InvalidDocument):
        ChunkIndex.from_bytes(index.to_bytes(), "i")


def test_a_truncated_or_foreign_index_is_refused():
    data = small().index.to_bytes()
    for bad in (data[:-1], data + b"\0", data[:40], b"", pack_columns(b"OTHERIDX", {}, {})):
        with pytest.raises(InvalidDocument):
            ChunkIndex.from_bytes(bad, "i")
