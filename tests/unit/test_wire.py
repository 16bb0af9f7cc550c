import json
import math

import pytest

from dcp_resume.errors import InvalidDocument, UnsupportedFormat
from dcp_resume.manifest import wire
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
    MeshEntry,
    PartSummary,
    Software,
    TensorEntry,
    Topology,
    TrainerFacts,
)
from dcp_resume.manifest.records import OpenRecord, PinRecord
from dcp_resume.manifest.seals import seal

DIGEST = "xxh3-128:" + "0" * 32

OPEN = OpenRecord(
    run="r", created="2026-01-01T00:00:00Z", generation=1, resume_source=None, incarnation="i"
)
CATALOG = Catalog(
    format=FormatMark(),
    tensors=(
        TensorEntry(
            fqn="model.größe",
            path=("model", {"key": 3}, 0),
            part="model",
            dtype="float32",
            global_shape=(4, 2),
            kind="sharded",
            mesh="m",
            placements=("S(0)",),
        ),
    ),
    files=(
        FileEntry(
            key="shard-00001.safetensors",
            part="model",
            rank=0,
            size=64,
            header_bytes=32,
            digest=DIGEST,
        ),
    ),
)
MANIFEST = Manifest(
    format=FormatMark(),
    run="r",
    attempt="a1",
    step=40,
    generation=1,
    parent=None,
    resume_source=None,
    created="2026-01-01T00:00:00Z",
    topology=Topology(
        world_size=2,
        meshes=(MeshEntry(id="m", axes=("dp",), shape=(2,)),),
        stages=((0, 1), (2,)),
    ),
    trainer=TrainerFacts(step=40, last_lr=(0.1,), metrics={"loss": math.nan}),
    optimizer={"optim": {"betas": (0.9, 0.999), "big": 2**60}},
    software=Software(dcp_resume="0", torch="2", python="3"),
    leaves=(LeafEntry(fqn="epoch", path=("epoch",), value={"$tuple": [1]}),),
    parts={"model": PartSummary(num_tensors=1, num_leaves=0, num_bytes=64, digest=DIGEST)},
    digest=DigestRule(block_size=2**16),
    counts=Counts(tensors=1, chunks=2, boxes=2, blocks=1, files=1, num_bytes=64),
    catalog=DocumentRef(key="catalog.json", size=10, digest=DIGEST),
    chunk_index=IndexRef(
        key="chunk-index", size=10, digest=DIGEST, block_size=2**16, block_digests=("0" * 32,)
    ),
)


def changed(document=OPEN, **fields):
    whole = json.loads(wire.encode(document))
    whole.pop("checksum", None)
    data = json.dumps({**whole, **fields}).encode() + b"\n"
    return data if document is CATALOG else seal(data)


def problems(data, decode=wire.decode_record):
    with pytest.raises((InvalidDocument, UnsupportedFormat)) as caught:
        decode(data, "doc")
    assert "doc" in str(caught.value)
    return [(problem.where, problem.kind) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("document", "decode"),
    [
        (OPEN, wire.decode_record),
        (CATALOG, wire.decode_catalog),
        (MANIFEST, wire.decode_manifest),
    ],
    ids=["record", "catalog", "manifest"],
)
def test_documents_come_back_equal_and_their_bytes_are_deterministic(document, decode):
    data = wire.encode(document)
    found = decode(data, "doc")
    assert wire.encode(found) == data
    assert str(found) == str(document)  # NaN is not equal to itself
    assert data.endswith(b"}\n")
    assert json.loads(data) == json.loads(data, parse_constant=pytest.fail)


def test_a_manifest_is_for_people_and_the_others_are_one_line():
    assert wire.encode(MANIFEST).count(b"\n") > 50
    assert wire.encode(CATALOG).count(b"\n") == 1
    assert "größe".encode() in wire.encode(CATALOG)


def test_keys_are_sorted_at_every_level():
    def check(pairs):
        assert [name for name, _ in pairs] == sorted(name for name, _ in pairs)

    json.loads(wire.encode(MANIFEST).replace(b"checksum", b"~"), object_pairs_hook=check)


def test_special_values_survive():
    found = wire.decode_manifest(wire.encode(MANIFEST), "doc")
    assert found.trainer.best_loss == math.inf
    assert math.isnan(found.trainer.metrics["loss"])
    assert found.optimizer == {"optim": {"betas": (0.9, 0.999), "big": 2**60}}
    assert found.topology.stages == ((0, 1), (2,))


def test_unknown_optional_fields_survive():
    data = changed(MANIFEST, x_note={"a": [1, None]}, zeta=1)
    trainer = json.loads(data)["trainer"] | {"mood": "good"}
    found = wire.decode_manifest(changed(MANIFEST, trainer=trainer, zeta=[1]), "doc")
    again = json.loads(wire.encode(found))
    assert again["trainer"]["mood"] == "good"
    assert again["zeta"] == [1]
    assert json.loads(wire.encode(wire.decode_manifest(data, "doc")))["x_note"] == {"a": [1, None]}


@pytest.mark.parametrize(
    ("mark", "where"),
    [
        ({"name": "other", "major": 1}, "name"),
        ({"major": 1}, "name"),
        ({"name": "dcp_resume", "major": 2}, "major"),
        ({"name": "dcp_resume", "major": True}, "major"),
        ({"name": "dcp_resume", "major": "1"}, "major"),
        ({"name": "dcp_resume"}, "major"),
        ({"name": "dcp_resume", "major": 1, "requires": ["zstd"]}, "requires"),
    ],
)
def test_15_another_format_or_version_is_refused_by_name(mark, where):
    with pytest.raises(UnsupportedFormat) as caught:
        wire.decode_record(changed(format=mark), "doc")
    assert [problem.where for problem in caught.value.problems] == [f"doc:format.{where}"]


def test_the_format_gate_names_everything_and_comes_before_the_fields():
    mark = {"name": "x", "major": 9, "requires": ["b", "a"]}
    with pytest.raises(UnsupportedFormat, match=r"(?s)'x'.*found 9.*'a'.*'b'"):
        wire.decode_record(json.dumps({"format": mark, "kind": 5}).encode(), "doc")


@pytest.mark.parametrize("number", [10**400, {"$int": "9" * 400}, True, "inf", {"$float": "x"}])
def test_what_is_no_float_is_refused(number):
    trainer = {"step": 1, "last_lr": [number]}
    found = problems(changed(MANIFEST, trainer=trainer), wire.decode_manifest)
    assert found == [("doc:trainer.last_lr[0]", "value_error")]


def test_a_newer_minor_version_is_read():
    mark = {"name": "dcp_resume", "major": 1, "minor": 7, "requires": [], "hint": 1}
    assert wire.decode_record(changed(format=mark), "doc").format.minor == 7


@pytest.mark.parametrize("data", [b"[]", b"3", b"{}", b'{"format": 1}', b'{"format": null}'])
def test_a_document_without_a_format_mark(data):
    assert problems(data) == [("doc:format", "missing")]


def test_all_faults_of_a_document_are_listed_at_once():
    tensor = json.loads(wire.encode(CATALOG))["tensors"][0]
    tensor |= {"dtype": 3, "global_shape": [4, -1, "x"], "kind": "odd"}
    del tensor["fqn"]
    found = problems(changed(CATALOG, tensors=[tensor], files=[{}]), wire.decode_catalog)
    assert set(found) >= {
        ("doc:tensors[0].fqn", "missing"),
        ("doc:tensors[0].dtype", "string_type"),
        ("doc:tensors[0].global_shape[1]", "greater_than_equal"),
        ("doc:tensors[0].global_shape[2]", "int_type"),
        ("doc:tensors[0].kind", "literal_error"),
        ("doc:files[0].key", "missing"),
    }


def test_a_records_fault_is_placed_by_its_field():
    assert problems(changed(generation=0)) == [("doc:generation", "greater_than_equal")]
    assert problems(changed(generation=1.5)) == [("doc:generation", "int_type")]
    assert problems(changed(kind="merge")) == [("doc", "union_tag_invalid")]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 2}',
        b'{"b": {"a": 1, "a": 1}}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}",
        b"[" * 60_000,
    ],
    ids=lambda data: data[:12].decode("latin-1"),
)
def test_what_is_not_strict_json(data):
    assert problems(data) == [("doc", "not_json")]


@pytest.mark.parametrize(
    ("document", "decode"),
    [(OPEN, wire.decode_record), (MANIFEST, wire.decode_manifest)],
    ids=["record", "manifest"],
)
def test_every_bit_of_a_record_or_manifest_is_proved(document, decode):
    whole = wire.encode(document)
    for position in range(8 * len(whole)):
        data = bytearray(whole)
        data[position // 8] ^= 1 << position % 8
        problems(bytes(data), decode)


def test_a_record_without_a_checksum_is_none():
    data = wire.encode(OPEN)
    assert problems(data[: data.rindex(b",\n")] + b"}\n") == [("doc", "checksum")]


@pytest.mark.parametrize("name", ["checksum", "signature"])
def test_fields_of_the_seal_are_not_written_twice(name):
    with pytest.raises(InvalidDocument, match="by the seal alone"):
        wire.encode(PinRecord(run="r", created="c", target=1, **{name: "x"}))


def test_surrogate_pairs_are_text():
    data = changed(incarnation="\N{ROCKET}")
    assert b"\\ud83d" in data
    assert wire.decode_record(data, "doc").incarnation == "\N{ROCKET}"


def test_duplicate_keys_are_found_in_time_that_does_not_square():
    names = ",".join(f'"k{n}":0' for n in range(5000))
    assert problems(f'{{{names},"k0":1}}'.encode()) == [("doc", "not_json")]


def test_size_caps_hold_in_both_directions():
    padded = wire.encode(OPEN).rstrip() + b" " * wire.MAX_RECORD_BYTES
    assert problems(padded) == [("doc", "too_large")]
    big = PinRecord(run="r", created="c", target=1, label="x" * wire.MAX_RECORD_BYTES)
    with pytest.raises(InvalidDocument, match="cannot write PinRecord"):
        wire.encode(big)
    facts = {str(n): "x" * 1000 for n in range(300)}
    with pytest.raises(InvalidDocument, match="at most 262144 bytes"):
        wire.encode(MANIFEST.model_copy(update={"model": facts}))


def test_nesting_is_bounded_alike_in_both_directions():
    note = 1
    for _ in range(wire.MAX_DEPTH - 2):
        note = (note,)
    document = PinRecord(run="r", created="c", target=1, x_note=note)
    assert wire.encode(wire.decode_record(wire.encode(document), "doc")) == wire.encode(document)
    with pytest.raises(InvalidDocument, match="deeper than 128"):
        wire.encode(document.model_copy(update={"x_note": (note,)}))
    assert problems(changed(x_note=[note])) == [("doc", "not_json")]


@pytest.mark.parametrize("value", [math.nan, b"bytes", "\ud800", object()])
def test_what_json_cannot_say_is_not_written(value):
    document = PinRecord(run="r", created="c", target=1, x_note=value)
    with pytest.raises(InvalidDocument, match="cannot write PinRecord"):
        wire.encode(document)
