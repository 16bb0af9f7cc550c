"""Any value that is accepted comes back equal, and of the same types."""

import contextlib
import json
from collections import OrderedDict

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dcp_resume.errors import InvalidDocument
from dcp_resume.format.leaf_tags import DECODERS
from dcp_resume.format.leaves import decode_leaf, encode_leaf, pack_leaves, unpack_leaves

text = st.text(st.characters(codec="utf-8"), max_size=8)
atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.sampled_from([torch.float32, torch.Size([1, 2]), torch.device("cpu"), np.float64(2.5)])
)  # fmt: skip
keys = text | st.integers() | st.tuples(st.integers(), text)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
        | st.frozensets(keys, max_size=4)
    ),
    max_leaves=15,
)


def shape_of(value):
    """The types of a value, all the way down."""
    if isinstance(value, dict):
        return type(value), [(shape_of(k), shape_of(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [shape_of(item) for item in value]
    return type(value)


@given(values)
def test_round_trip(value):
    data = pack_leaves({"x": (("x",), encode_leaf(value, "x"))})
    found = decode_leaf(unpack_leaves(data, "f")["x"][1], "x")
    assert found == value
    assert shape_of(found) == shape_of(value)


numpy_dtypes = st.sampled_from(["?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16", "U3"])


@given(hnp.arrays(numpy_dtypes, hnp.array_shapes(min_side=0)))
def test_arrays(array):
    found = decode_leaf(json.loads(json.dumps(encode_leaf(array, "x"))), "x")
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


json_keys = text | st.sampled_from(["dtype", "shape", "data", "$int", "$float", *sorted(DECODERS)])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(json_keys, inner, max_size=3),
)


@given(json_values)
def test_hostile_json_is_a_value_or_a_typed_error(value):
    with contextlib.suppress(InvalidDocument):
        decode_leaf(value, "x")
