"""Digests, block sizes, and blocks over buffers."""

import numpy as np
import pytest

from dcp_resume.errors import CorruptData
from dcp_resume.format.digests import (
    block_bounds,
    check_digest,
    choose_block_size,
    digest_blocks,
    digest_bytes,
    digest_hex,
    fold,
)


def test_literal_digests():
    assert digest_hex(b"abc") == "xxh3-128:06b05ab6733a618578af5f94892f3950"
    assert digest_bytes([memoryview(b"a"), memoryview(b"bc")]).hex() == digest_hex(b"abc")[9:]
    assert fold(b"") == digest_hex(b"")
    with pytest.raises(ValueError, match="multiple of 16"):
        fold(b"abc")


def test_a_wrong_digest_names_the_key_and_both_digests():
    check_digest(b"abc", digest_hex(b"abc"), "k")
    with pytest.raises(
        CorruptData, match=r"k: expected digest xxh3-128:0.*found xxh3-128:06b"
    ) as e:
        check_digest(b"abc", "xxh3-128:0", "k")
    assert e.value.problems[0].kind == "digest"
    with pytest.raises(CorruptData) as e:
        check_digest(b"abc", "md5:900150983cd24fb0d6963f7d28e17f72", "k")
    assert e.value.problems[0].kind == "algorithm"


@pytest.mark.parametrize(
    ("total", "size"),
    [
        (0, 2**16),
        (2**26 - 1, 2**16),
        (2**26, 2**20),
        (2 * 10**12, 2**20),
        (5_670 * 10**9, 2**22),
        (10**15, 2**24),
    ],
)
def test_block_size(total, size):
    assert choose_block_size(total) == size


def test_literal_blocks():
    # Header of 10; a run of 3+3+0, 9 alone, 0+2+7 and 5 around 20, in blocks of 8.
    lengths = np.array([3, 3, 0, 9, 0, 2, 7, 20, 5])
    found = block_bounds(10, lengths, 8).tolist()
    assert found == [0, 8, 10, 16, 24, 25, 33, 34, 42, 50, 54, 59]


def test_digests_do_not_depend_on_how_the_file_lies_in_memory():
    data = bytes(range(200))
    bounds = block_bounds(10, np.array([3, 80, 107]), 32)
    whole = digest_blocks(bounds, [data])
    empty = memoryview(np.empty(0, np.uint8))
    pieces = [data[:10], empty, data[10:13], data[13:93], b"", data[93:]]
    assert digest_blocks(bounds, pieces) == whole
    assert len(whole) == 16 * (len(bounds) - 1)
    assert whole[:16] == digest_bytes([data[:10]])
    with pytest.raises(ValueError, match="found 199"):
        digest_blocks(bounds, [data[:199]])
