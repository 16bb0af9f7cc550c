"""Columns come back as they went; damaged bytes never pass as something else."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dcp_resume.errors import InvalidDocument
from dcp_resume.format.columns import pack_columns, unpack_columns

MAGIC = b"TESTTAB1"
dtypes = st.sampled_from(["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">u4"])
columns = st.dictionaries(
    st.text(min_size=1, max_size=5),
    dtypes.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(max_dims=3, min_side=0))),
    max_size=5,
)


@given(columns, st.dictionaries(st.text(), st.integers() | st.text(), max_size=3))
def test_round_trip(table, meta):
    schema = {n: (f"{c.dtype.kind}{c.dtype.itemsize}", c.shape[1:]) for n, c in table.items()}
    data = pack_columns(MAGIC, table, meta)
    assert data == pack_columns(MAGIC, dict(reversed(table.items())), meta)
    found_meta, found = unpack_columns(MAGIC, data, "t", schema)
    assert found_meta == meta
    assert set(found) == set(table)
    for name, column in table.items():
        assert found[name].flags.aligned
        assert np.array_equal(found[name], column)


@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damage_is_refused_or_stays_in_the_data(position, flip, cut):
    table = {"a": np.arange(7, dtype=np.uint32), "b": np.arange(5, dtype=np.uint8)}
    data = bytearray(pack_columns(MAGIC, table, {}))
    position %= len(data)
    if cut:
        del data[position:]
    else:
        data[position] ^= flip
    try:
        _, found = unpack_columns(MAGIC, data, "t", {"a": ("u4", ()), "b": ("u1", ())})
    except InvalidDocument:
        return
    assert {name: c.shape for name, c in found.items()} == {"a": (7,), "b": (5,)}
