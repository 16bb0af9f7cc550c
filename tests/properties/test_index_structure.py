"""What an index says of structure: as the slow rule says, and worked out once."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.index_structure import IndexStructure
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.planning.box_rows import Boxes
from dcp_resume.planning.row_order import stable_order


def structure_of(files):
    """Files of 1-d chunks of uint8; ``files`` are the lengths of their chunks."""
    lengths = [length for file in files for length in file]
    sizes = np.array(lengths, np.int64).reshape(-1, 1)
    index = ChunkIndex.build(
        [len(file) for file in files], np.arange(len(lengths)), np.zeros_like(sizes), sizes,
        [1] * len(lengths), np.zeros((0, 16), np.uint8),
    )  # fmt: skip
    entries = [
        TensorEntry(
            fqn=f"t{number}", path=(f"t{number}",), part="p", dtype="uint8",
            global_shape=(length,), kind="replicated",
        )
        for number, length in enumerate(lengths)
    ]  # fmt: skip
    return IndexStructure(index, tuple(entries), [f"f{number}" for number in range(len(files))])


@given(
    st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=5),
    st.sampled_from([1, 8, 16, 64]),
    st.integers(0, 50),
)
def test_blocks_of_files_are_as_many_as_the_rule_cuts(files, block_size, header):
    structure = structure_of(files)
    assert structure.file_bytes.tolist() == [sum(file) for file in files]
    itemsizes, headers = [1] * len(structure.tensors), np.full(len(files), header)
    blocks = structure.index.blocks(itemsizes, headers, block_size)
    of_header = -(-header // block_size)
    found = structure.file_blocks(block_size)
    assert (found + of_header).tolist() == np.diff(blocks.first).tolist()
    assert structure.file_blocks(block_size) is found


KEYS = st.integers(0, 5) | st.integers(0, 2**62)


@given(st.lists(KEYS, max_size=40))
def test_rows_are_ordered_by_key_and_place(keys):
    column = np.array(keys, np.int64)
    order, found = stable_order(column)
    assert order.tolist() == sorted(range(len(keys)), key=lambda row: keys[row])
    assert found.tolist() == sorted(keys)


BOX = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3), st.integers(1, 3))


@given(st.lists(st.lists(BOX, max_size=6), max_size=4))
def test_boxes_of_several_tables_are_listed_once_each(tables):
    columns = [np.array(table, np.int64).reshape(-1, 4) for table in tables]
    parts = [Boxes(column[:, :2], column[:, 2:]) for column in columns]
    stacked = Boxes.stacked(parts, 3)
    assert len(stacked) == sum(map(len, tables))
    listed, row = stacked.distinct()
    assert np.array_equal(listed.offsets[row], stacked.offsets)
    assert np.array_equal(listed.sizes[row], stacked.sizes)
    assert len(listed) == len({box for table in tables for box in table})
