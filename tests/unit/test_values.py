import json
import math
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.manifest.values import decode_value, encode_value


def there_and_back(value):
    text = json.dumps(encode_value(value, where="x"), allow_nan=False)
    return decode_value(json.loads(text), where="x")


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
hashable = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)
values = st.recursive(
    hashable,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(hashable, inner, max_size=4),
    max_leaves=20,
)


def typed(value):
    """The value with the type of every part, because ``1 == True == 1.0``."""
    if isinstance(value, dict):
        return dict, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [typed(item) for item in value]
    return type(value), repr(value)


@given(values)
def test_values_come_back_with_their_types(value):
    assert typed(there_and_back(value)) == typed(value)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (math.inf, {"$float": "inf"}),
        (-math.inf, {"$float": "-inf"}),
        (2**53, 2**53),
        (2**53 + 1, {"$int": "9007199254740993"}),
        (-(2**60), {"$int": str(-(2**60))}),
        ((1, [2]), {"$tuple": [1, [2]]}),
        (b"\x00\xff", {"$bytes": "AP8="}),
        ({1: "a"}, {"$dict": [[1, "a"]]}),
        ({"$float": "inf"}, {"$dict": [["$float", "inf"]]}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    ],
)
def test_the_tags_are_these(value, encoded):
    assert encode_value(value, where="x") == encoded
    assert there_and_back(value) == value


def test_nan_is_tagged():
    assert encode_value(math.nan, where="x") == {"$float": "nan"}
    assert math.isnan(there_and_back(math.nan))


def test_negative_zero_keeps_its_sign():
    assert math.copysign(1, there_and_back(-0.0)) == -1


def test_an_unknown_type_is_refused_with_its_place():
    with pytest.raises(TypeError, match=r"optim\.state\.0: builtins\.set"):
        encode_value({"state": [set()]}, where="optim")


def test_subclasses_are_not_taken_for_their_base():
    class Name(str):
        pass

    for value in (Name("x"), bool):
        with pytest.raises(TypeError):
            encode_value(value, where="x")


@pytest.mark.parametrize(
    "value",
    [
        {"$float": "1.5"},
        {"$float": 3},
        {"$float": []},
        {"$int": 3},
        {"$int": "x"},
        {"$int": "9" * 5000},
        {"$tuple": 3},
        {"$bytes": "?"},
        {"$bytes": 3},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$dict": 3},
        {"$tuple": [], "$float": "inf"},
        {"$float": "inf", "other": 1},
        {"$unknown": 1},
        {"$tuple": [{"$unknown": 1}]},
    ],
    ids=repr,
)
def test_malformed_tags_are_refused_with_their_place(value):
    with pytest.raises(ValueError, match=r"^leaf\.x: "):
        decode_value(value, where="leaf.x")


def test_nesting_is_bounded_in_both_directions():
    deep = None
    for _ in range(70):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper than 64"):
        encode_value(deep, where="x")
    with pytest.raises(ValueError, match="deeper than 64"):
        decode_value(deep, where="x")


def test_extensions_encode_and_decode_what_is_unknown():
    encoded = encode_value(
        [{1, 2}], where="x", extension=lambda value, where: {"$set": sorted(value)}
    )
    assert encoded == [{"$set": [1, 2]}]
    decoded = decode_value(encoded, where="x", extension=lambda tag, body, where: (tag, body))
    assert decoded == [("$set", [1, 2])]


@pytest.mark.parametrize(
    "body", [{"$tuple": "abc"}, {"$tuple": {}}, {"$int": "1_0"}, {"$int": " 5"}, {"$int": "٣"}]
)
def test_loose_spellings_are_refused(body):
    with pytest.raises(ValueError, match="malformed"):
        decode_value(body, where="a.b")


def test_an_integer_too_long_to_be_read_back_is_refused_by_name():
    with pytest.raises(ValueError, match=r"a\.b: an integer of"):
        encode_value(10**4096, where="a.b")
    longest = 2 ** (4096 * 3) - 1
    assert decode_value(encode_value(longest, where="a"), where="a") == longest
