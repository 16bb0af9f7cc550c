"""Text as samples: windows of tokens, each with the same one token later."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Windows", "read_tokens"]

_TOKEN_FILES = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""First number of a token file of llm.c (GPT-2, LLaMA-3) → its tokens."""


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Neighbouring windows of a text.

    Args:
        tokens: The text.
        sequence_length: Tokens of a window.

    Raises:
        ValueError: The text is shorter than one window and one token.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int) -> None:
        if len(tokens) <= sequence_length:
            raise ValueError(f"the text has {len(tokens)} tokens; expected > {sequence_length}")
        self._tokens, self._length = tokens, sequence_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self._length
        window = self._tokens[start : start + self._length + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])

    @property
    def fingerprint(self) -> str:
        """Tells whether a resumed run goes on with the same windows of the same text."""
        ends = np.concatenate((self._tokens[:4096], self._tokens[-4096:])).tobytes()
        digest = hashlib.blake2b(ends, digest_size=8).hexdigest()
        return f"{len(self._tokens)} tokens by {self._length}, {digest}"


def read_tokens(path: Path | None) -> np.ndarray:
    """A token file of llm.c, the bytes of any other file, or the bytes of a text at hand.

    That text is the language reference that every CPython carries: 466 kB of English.
    """
    if path is None:
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        return np.frombuffer(text, np.uint8)
    header = np.fromfile(path, np.dtype("<i4"), 256)
    dtype = _TOKEN_FILES.get(int(header[0])) if len(header) == 256 else None
    if dtype is None:
        return np.memmap(path, np.uint8, "r")
    return np.memmap(path, dtype, "r", offset=256 * 4, shape=(int(header[2]),))
