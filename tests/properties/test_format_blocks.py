"""The block rule against a loop that follows its words."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.format.digests import BlockRule, block_bounds, digest_blocks, digest_bytes

lengths_of_file = st.lists(st.integers(0, 40), max_size=30)


def naive_bounds(header, lengths, block_size):
    sequences, in_run = [header], False
    for length in lengths:
        is_large = length >= block_size
        if is_large or not in_run:
            sequences.append(0)
        sequences[-1] += length
        in_run = not is_large
    bounds, position = [], 0
    for length in sequences:
        bounds += range(position, position + length, block_size)
        position += length
    return [*bounds, position]


@given(st.integers(0, 50), lengths_of_file, st.integers(1, 16))
def test_one_file(header, lengths, block_size):
    found = block_bounds(header, np.array(lengths, np.int64), block_size)
    assert found.dtype == np.int64
    assert found.tolist() == naive_bounds(header, lengths, block_size)


@given(st.lists(st.tuples(st.integers(0, 50), lengths_of_file), max_size=8), st.integers(1, 16))
def test_many_files_are_cut_as_each_alone(files, block_size):
    blocks = BlockRule(block_size).cut(
        np.array([header for header, _ in files], np.int64),
        np.array([len(lengths) for _, lengths in files], np.int64),
        np.array([length for _, lengths in files for length in lengths], np.int64),
    )
    for number, (header, lengths) in enumerate(files):
        assert blocks.bounds(number).tolist() == naive_bounds(header, lengths, block_size)
    assert blocks.first[-1] == len(blocks.starts)


@given(st.binary(max_size=200), lengths_of_file, st.lists(st.integers(0, 200)), st.integers(1, 16))
def test_digests_are_of_the_blocks(data, lengths, cuts, block_size):
    header = max(0, len(data) - sum(lengths))
    data = data.ljust(header + sum(lengths), b"x")
    bounds = block_bounds(header, np.array(lengths, np.int64), block_size)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    expected = [digest_bytes([data[a:b]]) for a, b in pairwise(bounds)]
    assert digest_blocks(bounds, pieces) == b"".join(expected)
