"""The digest of a tensor: the same however it is cut, another after any change of an element."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dcp_resume.format import position_digest
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.format.tensor_bytes import as_bytes
from dcp_resume.manifest.boxes import Box

SEEDED = settings(derandomize=True, deadline=None, max_examples=60)

MASK = 2**64 - 1
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)
ITEMSIZES = st.sampled_from([1, 2, 4, 8, 16])


def random_bytes(shape, itemsize, seed=0):
    size = (*shape, itemsize)
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def digest_of(array):
    """Of a whole ``[*shape, itemsize]`` array of bytes."""
    *shape, itemsize = array.shape
    return PositionDigest.of(array.tobytes(), itemsize, Box.whole(tuple(shape)), tuple(shape))


def mix(value):
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 & MASK
    value ^= value >> 27
    value = value * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


def by_the_page(array):
    """The formula of the format's page, element by element."""
    itemsize = array.shape[-1]
    words = array.tobytes()
    width = min(itemsize, 8)
    elements = [words[n : n + width] for n in range(0, len(words), width)]
    mixed = [
        mix((int.from_bytes(bits, "little") + (i + 1) * 0x9E3779B97F4A7C15) & MASK)
        for i, bits in enumerate(elements)
    ]
    return f"{sum(mixed) & MASK:016x}{sum(m * m for m in mixed) & MASK:016x}"


@st.composite
def tilings(draw):
    """A shape, and boxes that tile it: a grid with random cuts in every dim."""
    shape = draw(st.lists(st.integers(1, 6), max_size=4).map(tuple))
    axes = []
    for size in shape:
        cuts = draw(st.sets(st.integers(1, max(1, size - 1)), max_size=3)) if size > 1 else set()
        bounds = [0, *sorted(cuts), size]
        axes.append([(a, b - a) for a, b in itertools.pairwise(bounds)])
    cells = itertools.product(*axes)
    boxes = [Box(tuple(o for o, _ in cell), tuple(s for _, s in cell)) for cell in cells]
    return shape, draw(st.permutations(boxes))


@SEEDED
@given(shape=SHAPES, itemsize=ITEMSIZES, seed=st.integers(0, 9))
def test_it_is_what_the_format_says(shape, itemsize, seed):
    array = random_bytes(shape, itemsize, seed)
    assert digest_of(array).hex == by_the_page(array)


def test_the_page_has_the_right_example():
    page = (Path(__file__).parents[2] / "docs/reference/format.md").read_text(encoding="utf-8")
    (value,) = re.findall(r"has the value `([0-9a-f]{32})`", page)
    array = np.frombuffer(as_bytes(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)), np.uint8)
    assert array.tobytes().hex(" ") in page
    assert value == by_the_page(array.reshape(2, 2)) == digest_of(array.reshape(2, 2)).hex


@SEEDED
@given(tiling=tilings(), itemsize=ITEMSIZES)
def test_any_tiling_adds_up_to_the_same(tiling, itemsize):
    shape, boxes = tiling
    array = random_bytes(shape, itemsize)
    total = PositionDigest()
    for box in boxes:
        region = tuple(slice(a, b) for a, b in zip(box.offsets, box.stops, strict=True))
        total += PositionDigest.of(array[region].tobytes(), itemsize, box, shape)
    assert total == digest_of(array)


@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2), (3, 5, 7_000), (70_001,)])
def test_tensors_of_several_blocks(shape):
    """Rows longer and shorter than a block; cut in a dim that makes rows no runs."""
    array = random_bytes(shape, 2)
    total = PositionDigest()
    for dim_start, dim_stop in itertools.pairwise((0, 1, shape[-1] // 3 + 1, shape[-1])):
        sizes = (*shape[:-1], dim_stop - dim_start)
        box = Box((*(0 for _ in shape[:-1]), dim_start), sizes)
        total += PositionDigest.of(array[..., dim_start:dim_stop, :].tobytes(), 2, box, shape)
    assert math.prod(shape) > position_digest.BLOCK
    assert total == digest_of(array)


@SEEDED
@given(shape=SHAPES, itemsize=ITEMSIZES, data=st.data())
def test_one_flipped_bit_always_changes_the_first_sum(shape, itemsize, data):
    assume(math.prod(shape))
    array = random_bytes(shape, itemsize)
    changed = array.copy()
    changed.reshape(-1)[data.draw(st.integers(0, array.size - 1))] ^= data.draw(
        st.sampled_from([1 << bit for bit in range(8)])
    )
    before, after = digest_of(array), digest_of(changed)
    assert before.total != after.total
    assert before.squares != after.squares


@SEEDED
@given(rows=st.integers(2, 8), columns=st.integers(1, 8), itemsize=ITEMSIZES, data=st.data())
def test_elements_at_other_places_change_it(rows, columns, itemsize, data):
    array = random_bytes((rows, columns), itemsize)
    order = data.draw(st.permutations(range(rows * columns)))
    flat = array.reshape(-1, itemsize)
    permuted = flat[list(order)].reshape(array.shape)
    for moved in (permuted, np.roll(array, 1, axis=0), np.roll(array, 1, axis=1), array[::-1]):
        assert (digest_of(moved) == digest_of(array)) == np.array_equal(moved, array)


@SEEDED
@given(rows=st.integers(3, 8), columns=st.integers(1, 8), itemsize=ITEMSIZES, data=st.data())
def test_a_boundary_between_boxes_that_moves_changes_it(rows, columns, itemsize, data):
    """Rows of two shards, put together as if the first had one row more, or one less."""
    array = random_bytes((rows, columns), itemsize)
    cut = data.draw(st.integers(1, rows - 2))
    moved = cut + 1
    first, second = array[:cut], array[cut:]
    shifted = np.concatenate([first, second[:1], second[: rows - moved]])
    assert (digest_of(shifted) == digest_of(array)) == np.array_equal(shifted, array)


@SEEDED
@given(columns=st.integers(1, 40), itemsize=ITEMSIZES, data=st.data())
def test_swapped_rows_change_it(columns, itemsize, data):
    array = random_bytes((6, columns), itemsize)
    a, b = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=2, unique=True))
    swapped = array.copy()
    swapped[[a, b]] = array[[b, a]]
    assert (digest_of(swapped) == digest_of(array)) == np.array_equal(swapped, array)


@pytest.mark.parametrize("count", [2, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sign_flips_do_not_cancel_out(dtype, count):
    """The top bits of an even number of elements: without mixing, their sum would not change."""
    whole = torch.arange(1.0, 1001.0).to(dtype)
    flipped = whole.clone()
    flipped[:count] *= -1
    box = Box.whole((1000,))
    found = {PositionDigest.of(as_bytes(t), dtype.itemsize, box, (1000,)) for t in (whole, flipped)}
    assert len(found) == 2


def test_ten_thousand_changes_give_as_many_digests():
    array = np.zeros((100, 1), np.uint8)
    found = {digest_of(array).hex}
    firsts = set()
    for a, b in itertools.product(range(100), range(100)):
        changed = array.copy()
        changed[a] += 1
        changed[b] += 2
        digest = digest_of(changed)
        found.add(digest.hex)
        firsts.add(digest.total)
    assert len(found) == 10_001
    assert len(firsts) == 10_000


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 3)])
def test_every_dtype_and_shape(name, shape):
    info = DTYPES[name]
    raw = torch.from_numpy(random_bytes(shape, info.itemsize, 3))
    if info.torch_dtype is torch.bool:
        raw %= 2
    tensor = torch.empty(shape, dtype=info.torch_dtype)
    tensor.reshape(-1).view(torch.uint8).copy_(raw.reshape(-1))
    data = as_bytes(tensor)
    found = PositionDigest.of(data, info.itemsize, Box.whole(shape), shape)
    assert found.hex == by_the_page(np.frombuffer(data, np.uint8).reshape(*shape, info.itemsize))
    assert (found == PositionDigest()) == (tensor.numel() == 0)


def test_zeros_of_two_signs_and_payloads_of_nan_differ():
    values = [torch.tensor([0.0]), torch.tensor([-0.0])]
    values += [
        torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        for bits in (0x7FC00000, 0x7FC00001)
    ]
    assert len({PositionDigest.of(as_bytes(v), 4, Box((0,), (1,)), (1,)) for v in values}) == 4


@SEEDED
@given(total=st.integers(0, MASK), squares=st.integers(0, MASK))
def test_the_hex_digits_come_back(total, squares):
    digest = PositionDigest(total, squares)
    assert PositionDigest.from_hex(digest.hex) == digest


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not lie in"):
        PositionDigest.of(b"ab", 1, Box((1,), (2,)), (2,))
    with pytest.raises(ValueError, match="expected 2 elements of 4 bytes"):
        PositionDigest.of(b"ab", 4, Box((0,), (2,)), (2,))
    with pytest.raises(ValueError, match="32 hex digits"):
        PositionDigest.from_hex("ab")
