"""Leaves: what is stored, what is refused, and what hostile JSON cannot do."""

import dataclasses
import enum
import json
import math
import pathlib
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch

from dcp_resume.errors import InvalidDocument, UnsupportedLeaf
from dcp_resume.format.leaves import (
    decode_leaf,
    encode_leaf,
    pack_leaves,
    register_enum,
    unpack_leaves,
)


@register_enum
class Schedule(enum.Enum):
    COSINE = "cosine"
    LINEAR = "linear"


@register_enum
class Mode(enum.Flag):
    A = 1
    B = 2


class Stranger(enum.Enum):
    X = 1


@dataclasses.dataclass
class Config:
    lr: float = 0.1


def round_trip(value):
    text = json.dumps(encode_leaf(value, "x"), allow_nan=False)
    return decode_leaf(json.loads(text), "x")


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, (2.5, "é")], 3: {"$x": b"\0"}},
        2**70,
        -math.inf,
        torch.bfloat16,
        torch.qint8,
        torch.Size([2, 0]),
        torch.device("cuda", 1),
        torch.device("cpu"),
        Schedule.COSINE,
        Mode.B,
        {1, "a", (2,)},
        frozenset({frozenset({1})}),
        1 - 2j,
        slice(1, None, 2),
        OrderedDict([("b", 1), ("a", OrderedDict([(3, Schedule.LINEAR)]))]),
        np.float32(1.5),
        np.int64(-(2**63)),
        np.bool_(True),
        np.str_("añ"),
        np.str_(""),
        np.complex64(1j),
    ],
)
def test_round_trip(value):
    found = round_trip(value)
    assert type(found) is type(value)
    assert found == value


def test_round_trip_of_arrays_and_tensors():
    for array in (np.arange(6, dtype=np.uint32).reshape(2, 3), np.array(2.5), np.zeros((0, 3))):
        found = round_trip({"state": ("MT19937", array)})["state"][1]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
        found.flags.writeable = True
    big_endian = round_trip(np.array([1.5], ">f8"))
    assert big_endian.dtype == np.float64
    assert big_endian[0] == 1.5
    betas = round_trip((torch.tensor(0.9), torch.tensor([True, False]), torch.zeros(0, 2)))
    assert betas[0] == torch.tensor(0.9)
    assert betas[1].tolist() == [True, False]
    assert betas[2].shape == (0, 2)
    assert math.isnan(round_trip(float("nan")))
    assert isinstance(round_trip(OrderedDict(a=1)), OrderedDict)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (pathlib.PurePosixPath("/a"), r"x: pathlib\S*.PurePosixPath; store str\(value\)"),
        (defaultdict(int), r"x: collections.defaultdict; store dict\(value\)"),
        ({"a": [Counter()]}, r"x.a.0: collections.Counter; store dict\(value\)"),
        (Config(), r"store dataclasses.asdict\(value\)"),
        (Config, r"code is not state"),
        (len, r"code is not state"),
        (Stranger.X, r"register_enum\(Stranger\)"),
        (Mode.A | Mode.B, r"no single member"),
        (torch.Generator(), r"get_state"),
        (np.array(["2020-01-01"], "M8[D]"), r"store its plain parts"),
        (np.array([object()]), r"store its plain parts"),
        (np.ma.masked_array([1]), r"store its plain parts"),
        (np.longdouble(1), r"store its plain parts"),
        ((torch.zeros(2**16),), r"hold it in a dict or list"),
        ((torch.zeros(2).to_sparse(),), r"dense parts"),
        ("\ud800", r"surrogates"),
        (type("List", (list,), {})(), r"List; store it as JSON types"),
    ],
)
def test_refusals_name_place_type_and_remedy(value, remedy):
    with pytest.raises(UnsupportedLeaf, match=remedy) as caught:
        encode_leaf(value, "x")
    assert caught.value.problems[0].where == "x"


def test_a_value_that_holds_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(UnsupportedLeaf, match="nested deeper"):
        encode_leaf(loop, "x")


def test_what_is_accepted_is_not_too_deep_for_a_document():
    value = 1
    for _ in range(30):
        value = (value,)
    assert round_trip(value) == value
    with pytest.raises(UnsupportedLeaf, match="nested too deep"):
        encode_leaf([value] * 2 + [((((((value,),),),),),)], "x")
    deep = frozenset()
    for _ in range(50):
        deep = frozenset([deep])
    with pytest.raises(UnsupportedLeaf, match="nested too deep"):
        encode_leaf(deep, "x")


def nested(depth):
    value = []
    for _ in range(depth):
        value = {"$set": [value]}
    return value


@pytest.mark.parametrize(
    "body",
    [
        {"$pickle": "gASVAAA="},
        {"$enum": ["os.system", "rm"]},
        {"$enum": [f"{__name__}.Schedule", "mro"]},
        {"$enum": [f"{__name__}.Schedule", ["COSINE"]]},
        {"$enum": [["a"], "b"]},
        {"$numpy": {"dtype": "O", "shape": [1], "data": ""}},
        {"$numpy": {"dtype": "<f4", "shape": [2], "data": "AAAA"}},
        {"$numpy": {"dtype": "<f4", "shape": [2**62, 2**62], "data": ""}},
        {"$numpy": {"dtype": "<f4", "shape": [-1], "data": ""}},
        {"$numpy": {"dtype": "|b1", "shape": [1], "data": "Ag=="}},
        {"$numpy": {"dtype": "<U1", "shape": [1], "data": "/////w=="}},
        {"$numpy": {"dtype": "<f4", "shape": [], "data": "!!!!"}},
        {"$numpy": []},
        {"$tensor": {"dtype": "qint8", "shape": [1], "data": "AA=="}},
        {"$tensor": {"dtype": "bool", "shape": [1], "data": "Ag=="}},
        {"$dtype": "load"},
        {"$device": "cuda:0; import os"},
        {"$device": "nowhere:1"},
        {"$size": [1.5]},
        {"$set": [[1]]},
        {"$complex": ["1", 2, 3]},
        {"$slice": 7},
        {"$complex": [10**400, 0]},
        {"$ordered_dict": [[1]]},
        nested(5000),
    ],
)
def test_hostile_values_are_refused(body):
    with pytest.raises(InvalidDocument):
        decode_leaf(body, "x")


def test_an_unregistered_enum_says_the_remedy():
    with pytest.raises(InvalidDocument, match="call register_enum"):
        decode_leaf({"$enum": ["a.B", "C"]}, "x")
    with pytest.raises(ValueError, match="another enum"):
        register_enum(enum.Enum(Schedule.__qualname__, "A", module=__name__))


def test_packed_leaves_are_canonical():
    leaves = {"b": (("b", 0), 1), "a": (("a", {"key": 3}), {"z": [2.5], "y": "é"})}
    data = pack_leaves(leaves)
    assert data.decode() == (
        '{"leaves":[{"fqn":"a","path":["a",{"key":3}],"value":{"z":[2.5],"y":"é"}},'
        '{"fqn":"b","path":["b",0],"value":1}]}'
    )
    assert unpack_leaves(data, "f") == leaves
    assert pack_leaves(dict(reversed(leaves.items()))) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"leaves":3}',
        b'{"leaves":[{"fqn":"a","path":[]}]}',
        b'{"leaves":[{"fqn":"a","path":[],"value":1}]}',
        b'{"leaves":[{"fqn":"a","path":[1.5],"value":1}]}',
        b'{"leaves":[{"fqn":"a","path":[{"key":"x"}],"value":1}]}',
        b'{"leaves":[{"fqn":1,"path":["a"],"value":1}]}',
        b'{"leaves":[{"fqn":"a","path":["a"],"value":1},{"fqn":"a","path":["a"],"value":2}]}',
        b'{"leaves":[{"fqn":"a","path":["a"],"value":1,"value":2}]}',
        b'{"leaves":[{"fqn":"a","path":["a"],"value":Infinity}]}',
        b'{"leaves":' + b"[" * 100_000,
    ],
)
def test_hostile_leaves_are_refused(data):
    with pytest.raises(InvalidDocument):
        unpack_leaves(data, "f")
