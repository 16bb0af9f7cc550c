"""Element types: their names and sizes, and which tensors can be stored at all.

>>> DTYPES["bfloat16"].safetensors_name
'BF16'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from dcp_resume.errors import Problem

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "ITEMSIZES", "DtypeInfo", "check_tensor", "dtype_info"]

RESERVED_KEY = "__metadata__"
"""The one name that a safetensors header keeps for itself."""


@dataclass(frozen=True, slots=True)
class DtypeInfo:
    """One element type that can be stored."""

    name: str
    """Name in torch, without the prefix."""
    itemsize: int
    """Bytes of one element of the tensor."""
    safetensors_name: str | None
    """Code in a header; None where safetensors has no code for exactly this shape, so that the
    bytes are stored as ``U8`` with a last dimension of ``itemsize``."""
    stock_readable: bool
    """Whether torch's HuggingFaceStorageReader can read it. One code that it does not know would
    break the load of the whole directory, so other types go to ``.part`` files."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself; the only thing here that loads torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


_CODES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
    "complex64": ("C64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
}
"""Name → code in a header, bytes of an element."""
_AS_BYTES = {
    "complex128": 16,
    "complex32": 4,
    # Its code F4 counts half-bytes: shapes and offsets would be doubled, and 0-d has no last
    # dimension to double.
    "float4_e2m1fn_x2": 1,
}
_NOT_STOCK = {"float8_e8m0fnu", *_AS_BYTES}


DTYPES: Mapping[str, DtypeInfo] = MappingProxyType(
    {
        **{
            name: DtypeInfo(name, itemsize, code, name not in _NOT_STOCK)
            for name, (code, itemsize) in _CODES.items()
        },
        **{name: DtypeInfo(name, itemsize, None, False) for name, itemsize in _AS_BYTES.items()},
    }
)
"""Every element type that can be stored, by name."""

ITEMSIZES: Mapping[str, int] = MappingProxyType(
    {name: info.itemsize for name, info in DTYPES.items()}
)
"""Bytes of one element, by name."""


def _short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_info(dtype: torch.dtype) -> DtypeInfo:
    """The entry of a torch dtype.

    Raises:
        ValueError: The dtype cannot be stored: quantised, sub-byte or opaque bits.
    """
    info = DTYPES.get(_short_name(dtype))
    if info is None:
        raise ValueError(
            f"{dtype} cannot be stored: expected one of {', '.join(DTYPES)}; convert the tensor "
            "or view it as uint8"
        )
    return info


def check_tensor(tensor: torch.Tensor, fqn: str) -> Problem | None:
    """Whether a tensor can be stored, or why not.

    Args:
        tensor: Any tensor; of a DTensor also the local part is looked at.
        fqn: Its name, for the problem.

    Returns:
        None where it can be stored; else a problem of kind ``name``, ``tensor_type``, ``layout``,
        ``device`` or ``dtype`` that ends with the remedy.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if fqn == RESERVED_KEY:
        return Problem(fqn, "name", "the name is reserved by safetensors; rename the tensor")
    if type(tensor) is DTensor:
        with torch.no_grad():
            return check_tensor(tensor.to_local(), fqn)
    found = f"found {type(tensor).__module__}.{type(tensor).__qualname__} of {tensor.dtype}"
    if tensor.is_nested or tensor.layout is not torch.strided:
        remedy = f"expected a strided tensor, {found}, {tensor.layout}; store its dense parts"
        return Problem(fqn, "layout", remedy)
    if tensor.is_quantized or _short_name(tensor.dtype) not in DTYPES:
        remedy = f"its dtype cannot be stored, {found}; dequantise it or view it as uint8"
        return Problem(fqn, "dtype", remedy)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        remedy = f"only Tensor, Parameter and DTensor are stored, {found}; store its plain parts"
        return Problem(fqn, "tensor_type", remedy)
    if tensor.device.type == "meta":
        return Problem(fqn, "device", f"a meta tensor has no data, {found}; materialise it first")
    return None
