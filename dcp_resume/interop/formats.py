"""The formats of others, and what each can hold."""

from __future__ import annotations

from enum import Enum

__all__ = ["Format", "Leftovers"]


class Format(Enum):
    """A checkpoint format of another library."""

    SAFETENSORS = "safetensors"
    """A file, or a directory of files and ``model.safetensors.index.json``."""
    TORCH = "torch"
    """A file of ``torch.save``; read, also a directory of ``pytorch_model*.bin``."""
    DCP = "dcp"
    """A directory of ``torch.distributed.checkpoint``."""
    MEGATRON = "torch_dist"
    """A directory of megatron-core's ``dist_checkpointing``."""
    LLMC = "llmc"
    """A model file of llm.c."""
    INFINITRAIN = "infinitrain"
    """A step directory of InfiniTrain."""

    @property
    def is_directory(self) -> bool:
        """Whether it is exported as a directory."""
        return self not in (Format.TORCH, Format.LLMC)

    @property
    def holds_values(self) -> bool:
        """Whether non-tensor leaves have a place in it."""
        return self in (Format.TORCH, Format.DCP, Format.MEGATRON)


class Leftovers(Enum):
    """What to do with what a format cannot hold."""

    REFUSE = "refuse"
    """Say all of it, and write nothing."""
    DROP = "drop"
    """Leave it out, and list it in the result."""
