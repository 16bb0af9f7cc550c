"""Data files: literal bytes, strangers that read them, hostile headers."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from dcp_resume.errors import InvalidDocument
from dcp_resume.format.data_file import (
    ChunkHeader,
    header_bytes,
    parse_header,
)
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.format.tensor_bytes import as_bytes
from tests.unit.test_format_dtypes import pattern

GOLDEN = (
    b"\xf8\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"DCP_SHARDING_INFO":"{\\"w\\":{\\"saved_offsets\\":[2,0]},'
    b'\\"n\\":{\\"saved_offsets\\":[]}}","DCP_VERSION":"1.0","format":"pt"},'
    b'"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
    b'"n":{"dtype":"I8","shape":[],"data_offsets":[8,9]}}     '
)
CHUNKS = [ChunkHeader("w", "float32", (2, 1), (2, 0)), ChunkHeader("n", "int8", (), ())]


def test_literal_header():
    assert header_bytes(CHUNKS) == GOLDEN
    assert parse_header(GOLDEN, "f") == CHUNKS
    assert len(header_bytes([])) % 64 == 0
    assert parse_header(header_bytes([]), "f") == []


@pytest.mark.parametrize("keys", [["a", "a"], ["__metadata__"], ["\ud800"]])
def test_keys_that_a_file_cannot_hold(keys):
    with pytest.raises(ValueError, match=r"cannot hold|surrogates"):
        header_bytes([ChunkHeader(key, "int8", (), ()) for key in keys])


def header_of(document):
    text = json.dumps(document).encode() if isinstance(document, dict) else document
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def document_with(sharding=None, **entries):
    sharding = {k: {"saved_offsets": [0]} for k in entries} if sharding is None else sharding
    metadata = {
        "DCP_SHARDING_INFO": json.dumps(sharding),
        "DCP_VERSION": "1.0",
        "format": "pt",
    }
    return {"__metadata__": metadata, **entries}


def entry(begin, end, shape=None, dtype="U8"):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (b"", ["length", "header"]),
        (b"\xff" * 8, ["length", "header"]),
        (GOLDEN[:-1], ["length", "header"]),
        (header_of(b"[]"), ["json", "header"]),
        (header_of(b'{"a":1,"a":2}'), ["json", "header"]),
        (header_of(b"[" * 100_000), ["json", "header"]),
        (header_of(b'{"a":NaN}'), ["json", "header"]),
        (header_of({"__metadata__": {"DCP_SHARDING_INFO": "{}"}}), ["header"]),
        (header_of({"__metadata__": {"DCP_VERSION": 1.0}}), ["header"]),
        (header_of(document_with(a=entry(0, 4), b=entry(2, 6))), ["overlap_or_gap"]),
        (header_of(document_with(a=entry(0, 4), b=entry(5, 6))), ["overlap_or_gap"]),
        (header_of(document_with({}, a=entry(0, 4))), ["header"]),
        (header_of(document_with({"b": {"saved_offsets": []}})), ["header"]),
        (header_of(document_with(a=entry(0, 4, [2**62, 2**62]))), ["header"]),
        (header_of(document_with(a=entry(0, 4, [-4]))), ["header"]),
        (header_of(document_with(a=entry(0, 4, [4.0]))), ["header"]),
        (header_of(document_with(a=entry(0, 4, [True]))), ["header"]),
        (header_of(document_with(a=entry(0, 4, dtype="Q4"))), ["header"]),
        (header_of(document_with(a=[])), ["header"]),
        (
            header_of(
                document_with({"a": {"saved_offsets": [0], "dtype": "complex128"}}, a=entry(0, 4))
            ),
            ["header"],
        ),
        (
            header_of(document_with({"a": {"saved_offsets": [0], "dtype": "int8"}}, a=entry(0, 4))),
            ["header"],
        ),
        (header_of(document_with(a=entry(0, 4, [9]), b=entry(0, 4, [8]))), ["header", "header"]),
    ],
)
def test_hostile_headers_are_refused_with_all_problems(data, kinds):
    with pytest.raises(InvalidDocument) as caught:
        parse_header(data, "f")
    assert [problem.kind for problem in caught.value.problems] == kinds


def write_file(path, chunks):
    """Write one file from (key, tensor, offsets)."""
    chunks = sorted(chunks, key=lambda chunk: -chunk[1].element_size())
    heads = [
        ChunkHeader(key, str(t.dtype).removeprefix("torch."), tuple(t.shape), offsets)
        for key, t, offsets in chunks
    ]
    path.write_bytes(header_bytes(heads) + b"".join(as_bytes(t) for _, t, _ in chunks))


def test_stock_dcp_load_reads_and_reshards_our_files(tmp_path):
    stock = [name for name, info in DTYPES.items() if info.stock_readable]
    whole = {name: pattern(DTYPES[name].torch_dtype, (5, 4)) for name in stock}
    scalar, empty = torch.tensor(7.5), torch.zeros(0, 3)
    for number, rows in enumerate([slice(0, 2), slice(2, 5)]):
        for side, columns in enumerate([slice(0, 1), slice(1, 4)]):
            chunks = [(n, t[rows, columns], (rows.start, columns.start)) for n, t in whole.items()]
            if number == side == 0:
                chunks += [("scalar", scalar, ()), ("empty", empty, (0, 0))]
            write_file(tmp_path / f"shard-{number}{side}.safetensors", chunks)
    write_file(tmp_path / "x.safetensors.part", [("hidden#0", torch.ones(2), (0,))])

    target = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    target |= {"scalar": torch.tensor(0.0), "empty": torch.zeros(0, 3)}
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in whole.items():
        assert bytes(as_bytes(target[name])) == bytes(as_bytes(tensor)), name
    assert target["scalar"] == scalar

    reader = HuggingFaceStorageReader(str(tmp_path))
    with pytest.raises(dcp.api.CheckpointException, match="Missing key"):
        dcp.load({"hidden": torch.zeros(2)}, storage_reader=reader, no_dist=True)
