"""A tensor's own memory as bytes, without a copy where it is dense on the CPU."""

from __future__ import annotations

import torch

__all__ = ["as_bytes", "contiguous_cpu"]


def contiguous_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, detached, on the CPU and in row-major order.

    Args:
        tensor: A plain tensor or parameter; of a DTensor pass the local part.

    Returns:
        A tensor that shares memory with ``tensor`` where that is already dense on the CPU and has
        no pending conjugation or negation (which are flags, not bytes).
    """
    if tensor.is_cpu and tensor.is_contiguous() and not _is_flagged(tensor):
        return tensor
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def _is_flagged(tensor: torch.Tensor) -> bool:
    """Whether there is more to it than its memory says."""
    return tensor.requires_grad or tensor.is_conj() or tensor.is_neg()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor.

    Args:
        tensor: As for ``contiguous_cpu``; any dtype of ``DTYPES``, also 0-d and empty.

    Returns:
        A flat view of format ``B`` and ``numel * itemsize`` bytes. It keeps the memory alive. Where
        ``contiguous_cpu`` makes no copy, writing to it writes to the tensor.
    """
    # uint8 first: numpy has no bfloat16, no fp8 and no complex32.
    return contiguous_cpu(tensor).reshape(-1).view(torch.uint8).numpy().data
