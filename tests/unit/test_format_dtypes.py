"""Element types and tensor bytes."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import _TYPES

from dcp_resume.format.data_file import ChunkHeader, header_bytes, parse_header
from dcp_resume.format.dtypes import DTYPES, ITEMSIZES, check_tensor, dtype_info
from dcp_resume.format.tensor_bytes import as_bytes, contiguous_cpu

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")


def pattern(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of arbitrary valid bits."""
    count = int(np.prod(shape)) * dtype.itemsize
    raw = (torch.arange(count, dtype=torch.int64) * 37 % 251).to(torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (3, 4)])
@pytest.mark.parametrize("name", DTYPES)
def test_bytes_are_the_tensors_own_memory(name, shape):
    tensor = pattern(DTYPES[name].torch_dtype, shape)
    view = as_bytes(tensor)
    assert view.format == "B"
    assert view.nbytes == tensor.numel() * ITEMSIZES[name]
    if view.nbytes:
        before = bytes(view)
        view[0] = view[0] ^ 1
        assert bytes(as_bytes(tensor)) == bytes([before[0] ^ 1]) + before[1:]


def test_pending_conjugation_negation_and_strides_are_resolved():
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert bytes(as_bytes(tensor.conj())) == bytes(as_bytes(torch.tensor([1 - 2j, 3 + 4j])))
    negative = torch.imag(tensor.conj())
    assert negative.is_neg()
    assert bytes(as_bytes(negative)) == bytes(as_bytes(torch.tensor([-2.0, 4.0])))
    assert bytes(as_bytes(torch.arange(6).reshape(2, 3).t()))[8:16] == (3).to_bytes(8, "little")
    parameter = torch.nn.Parameter(torch.ones(2))
    assert contiguous_cpu(parameter).data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("name", DTYPES)
def test_safetensors_reads_every_dtype(name, tmp_path):
    info = DTYPES[name]
    tensor = pattern(info.torch_dtype, (3, 4))
    header = header_bytes([ChunkHeader("x", name, (3, 4), (0, 0))])
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + as_bytes(tensor))
    assert parse_header(header, "x") == [ChunkHeader("x", name, (3, 4), (0, 0))]
    with safe_open(path, "pt") as file:
        if info.stock_readable:
            assert _TYPES[file.get_slice("x").get_dtype()] is info.torch_dtype
        found = file.get_tensor("x")
    assert found.shape == ((3, 4) if info.safetensors_name else (3, 4, info.itemsize))
    assert bytes(as_bytes(found)) == bytes(as_bytes(tensor))


def test_stock_readable_is_what_the_stock_reader_knows():
    known = set(_TYPES.values())
    assert {i.torch_dtype for i in DTYPES.values() if i.stock_readable} == known
    assert all(i.stock_readable is False for i in DTYPES.values() if not i.safetensors_name)
    assert dtype_info(torch.bfloat16) is DTYPES["bfloat16"]
    with pytest.raises(ValueError, match=r"torch\.qint8 cannot be stored"):
        dtype_info(torch.qint8)


class Wrapped(torch.Tensor):
    """A subclass whose bytes mean something else."""


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.zeros(2, 2).to_sparse(), "layout"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "layout"),
        (lambda: torch.zeros(2, device="meta"), "device"),
        (lambda: torch.zeros(2).as_subclass(Wrapped), "tensor_type"),
        (lambda: torch.zeros(4, dtype=torch.uint8).view(torch.bits8), "dtype"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), "dtype"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_cannot_be_stored_is_named(make, kind):
    problem = check_tensor(make(), "model.w")
    assert problem is not None
    assert (problem.where, problem.kind) == ("model.w", kind)


def test_what_can_be_stored():
    assert check_tensor(torch.zeros(2), "w") is None
    assert check_tensor(torch.nn.Parameter(torch.zeros(2)), "w") is None
    problem = check_tensor(torch.zeros(2), "__metadata__")
    assert problem is not None
    assert problem.kind == "name"
