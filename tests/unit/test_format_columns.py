"""Tables of columns, and hostile ones."""

import json

import numpy as np
import pytest

from dcp_resume.errors import InvalidDocument
from dcp_resume.format.columns import pack_columns, unpack_columns

MAGIC = b"TESTTAB1"
SCHEMA = {"a": ("u2", ()), "b": ("u1", (4,))}


def table(columns, meta=None, magic=MAGIC, tail=b""):
    header = {"columns": columns, "meta": {} if meta is None else meta}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(16 + len(text)) % 64)
    return magic + len(text).to_bytes(8, "little") + text + tail


def column(name, dtype, *shape):
    return {"name": name, "dtype": dtype, "shape": list(shape)}


GOOD = [column("a", "u2", 1), column("b", "u1", 1, 4)]


def test_literal_table():
    data = pack_columns(MAGIC, {"b": np.ones((1, 4), np.uint8), "a": np.array([258], ">u2")}, {})
    header = (
        b'{"columns":[{"dtype":"u2","name":"a","shape":[1]},'
        b'{"dtype":"u1","name":"b","shape":[1,4]}],"meta":{}}'
    )
    assert data == MAGIC + bytes([112]) + bytes(7) + header.ljust(112) + b"\x02\x01" + b"\1\1\1\1"
    _, columns = unpack_columns(MAGIC, data, "t", SCHEMA)
    assert columns["a"].tolist() == [258]
    with pytest.raises(ValueError, match="read-only"):
        columns["a"][0] = 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        MAGIC + b"\xff" * 8,
        table(GOOD, magic=b"OTHERTAB", tail=bytes(6)),
        table(GOOD, tail=bytes(5)),
        table(GOOD, tail=bytes(7)),
        table(GOOD[:1], tail=bytes(2)),
        table([*GOOD, GOOD[0]], tail=bytes(8)),
        table([*GOOD, column("c", "u1", 0)], tail=bytes(6)),
        table([column("a", "u2", 2**62), GOOD[1]], tail=bytes(6)),
        table([column("a", "u2", -1), GOOD[1]], tail=bytes(2)),
        table([column("a", "u4", 1), GOOD[1]], tail=bytes(8)),
        table([column("a", "O", 1), GOOD[1]], tail=bytes(8)),
        table([GOOD[0], column("b", "u1", 2, 2)], tail=bytes(6)),
        table([GOOD[0], column("b", "u1", 4)], tail=bytes(6)),
        table([3, None], tail=bytes(6)),
        table({}, tail=bytes(6)),
        table(GOOD, meta=[], tail=bytes(6)),
    ],
)
def test_hostile_tables_are_refused(data):
    with pytest.raises(InvalidDocument) as caught:
        unpack_columns(MAGIC, data, "t", SCHEMA)
    assert all(problem.where.startswith("t") for problem in caught.value.problems)


def test_every_problem_is_listed():
    with pytest.raises(InvalidDocument) as caught:
        unpack_columns(MAGIC, table([column("a", "u4", 1), 7]), "t", SCHEMA)
    assert [problem.where for problem in caught.value.problems] == ["t.columns[0]", "t.columns[1]"]


@pytest.mark.parametrize(
    ("magic", "columns", "meta"),
    [
        (b"short", {}, {}),
        (MAGIC, {"a": np.zeros(2)}, {}),
        (MAGIC, {"a": np.array(1)}, {}),
        (MAGIC, {}, {"a": "x" * 2**20}),
        (MAGIC, {}, {"a": float("nan")}),
    ],
)
def test_what_cannot_be_packed(magic, columns, meta):
    with pytest.raises(ValueError, match=r".+"):
        pack_columns(magic, columns, meta)
