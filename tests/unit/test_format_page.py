"""The specification page says what the code writes."""

import struct
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from dcp_resume.format.chunk_index import ChunkIndex
from dcp_resume.format.data_file import ChunkHeader, header_bytes
from dcp_resume.format.digests import block_bounds, digest_blocks, fold
from dcp_resume.format.dtypes import DTYPES
from dcp_resume.format.leaf_tags import DECODERS
from dcp_resume.manifest import models, records

PAGE = Path(__file__).parents[2] / "docs/reference/format.md"
EXAMPLE = PAGE.with_name("format-example.md")
BLOCK_SIZE = 2**16


def hex_dump(data):
    """Offset, 16 bytes in hex, and their ASCII, as ``hexdump -C`` prints them."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:08x}  {row[:8].hex(' '):23}  {row[8:].hex(' '):23}  |{text}|")
    return "\n".join(lines)


def worked_example():
    """The second rank of two: rows 2 and 3 of a float32 [4, 2], and a replicated int8."""
    chunks = [ChunkHeader("w", "float32", (2, 2), (2, 0)), ChunkHeader("n", "int8", (), ())]
    header = header_bytes(chunks)
    data = [struct.pack("<4f", 5, 6, 7, 8), bytes([7])]
    bounds = block_bounds(len(header), np.array([16, 1]), BLOCK_SIZE)
    digests = digest_blocks(bounds, [header, *data])
    index = ChunkIndex.build(
        file_chunk_count=[2],
        chunk_tensor=[0, 1],
        offsets=np.array([[2, 0], [0, 0]]),
        sizes=np.array([[2, 2], [1, 1]]),
        ndims=[2, 0],
        block_digest=np.frombuffer(digests, np.uint8),
    )
    return header + b"".join(data), index.to_bytes(), bounds.tolist(), fold(digests)


def test_the_worked_example_is_what_the_code_writes():
    page = EXAMPLE.read_text()
    file, index, bounds, digest = worked_example()
    assert hex_dump(file) in page
    assert hex_dump(index) in page
    assert f"`{bounds}`" in " ".join(page.split())
    assert digest in page


def documents():
    found = [*vars(models).values(), *vars(records).values()]
    return sorted(
        {m for m in found if isinstance(m, type) and issubclass(m, BaseModel)} - {BaseModel},
        key=lambda model: model.__name__,
    )


@pytest.mark.parametrize("model", documents(), ids=lambda model: model.__name__)
def test_every_field_of_every_document_is_on_the_page(model):
    page = PAGE.read_text()
    assert [name for name in model.model_fields if f"`{name}`" not in page] == []


def test_every_dtype_and_tag_is_on_the_page():
    page = PAGE.read_text()
    for info in DTYPES.values():
        stored = info.safetensors_name or "U8"
        assert f"| `{info.name}` | {info.itemsize} | `{stored}` |" in page
    assert [tag for tag in DECODERS if f"`{tag}`" not in page] == []


def test_lines_are_short():
    assert [line for line in PAGE.read_text().splitlines() if len(line) > 110] == []


if __name__ == "__main__":
    example_file, example_index, *facts = worked_example()
    print(hex_dump(example_file), hex_dump(example_index), *facts, sep="\n\n")
