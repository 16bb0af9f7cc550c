"""Where a model's weights come from before its first step; no part of the checkpoint format.

Each source is a function of a parameter's name and whole shape that returns the whole tensor, on
the CPU. A model on any number of ranks asks it for one parameter after the other, and keeps its
shards.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gpt2 import GPT2Config
from torch import Tensor

__all__ = ["HuggingFaceWeights", "LlmcWeights", "RandomWeights", "WrongWeights"]


class WrongWeights(ValueError):
    """The file is not what it should be, or holds another model."""


class RandomWeights:
    """Numbers that depend on the seed and the name only, so the same for every layout.

    Args:
        seed: Of the run.
        n_layer: Layers of the model: what each adds to the residual path is scaled down by it.
        ties: Name of a parameter → name of the one that it is.
    """

    def __init__(self, seed: int, n_layer: int, ties: Mapping[str, str]) -> None:
        self._seed, self._n_layer, self._ties = seed, n_layer, ties

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """Zeros for biases, ones for norms, else a normal distribution."""
        if name.endswith((".bias", ".lora_B")):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        std = 0.02
        if name.endswith((".c_proj.weight", ".o_proj.weight", ".down_proj.weight")):
            std /= math.sqrt(2 * self._n_layer)
        source = self._ties.get(name, name)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}/{source}".encode()))
        return torch.empty(shape).normal_(std=std, generator=generator)


class LlmcWeights:
    """A GPT-2 file of llm.c: 256 int32, then all tensors of a kind, layer after layer.

    Args:
        path: The ``.bin`` file, of version 3 (float32) or 5 (bfloat16).
        config: The model that it must hold.

    Raises:
        WrongWeights: Another kind of file, another model, or a file that is cut short.
    """

    _MAGIC, _DTYPES = 20240326, {3: torch.float32, 5: torch.bfloat16}
    _HEADER_BYTES = 256 * 4

    def __init__(self, path: Path, config: GPT2Config) -> None:
        self._path, self._config = path, config
        header = np.fromfile(path, np.dtype("<i4"), 256)
        if len(header) < 256 or header[0] != self._MAGIC or header[1] not in self._DTYPES:
            raise WrongWeights(f"{path}: expected a GPT-2 file of llm.c of version 3 or 5")
        self._dtype = self._DTYPES[int(header[1])]
        names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        found = dict(zip(names, header[2:7].tolist(), strict=True))
        differences = [
            f"{name} is {size}, the model's is {getattr(config, name)}"
            for name, size in found.items()
            if size != getattr(config, name)
        ]
        if differences:
            raise WrongWeights(f"{path}: {'; '.join(differences)}")
        self._places = self._lay_out(padded_vocab_size=int(header[7]))
        stop = max(start + math.prod(shape) for start, shape in self._places.values())
        expected = self._HEADER_BYTES + stop * self._dtype.itemsize
        if path.stat().st_size != expected:
            raise WrongWeights(f"{path}: {path.stat().st_size} bytes, expected {expected}")

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor that the file has under this name, without the padding of its vocabulary.

        Raises:
            WrongWeights: It has none.
        """
        stored = "transformer.wte.weight" if name == "lm_head.weight" else name
        if stored not in self._places:
            raise WrongWeights(f"{self._path} has no {name}")
        start, stored_shape = self._places[stored]
        numbers = torch.from_file(
            str(self._path),
            dtype=torch.uint8,
            size=self._HEADER_BYTES + (start + math.prod(stored_shape)) * self._dtype.itemsize,
        )
        whole = numbers[self._HEADER_BYTES + start * self._dtype.itemsize :].view(self._dtype)
        whole = whole.view(stored_shape)[: shape[0]].float()
        return by_head(whole, self._config.n_head) if ".c_attn." in name else whole

    def _lay_out(self, padded_vocab_size: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Name of each parameter → its first element in the file, and its shape there."""
        c = self._config
        wide = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1)}
        wide["mlp.c_proj"] = (1, 4)
        kinds: list[tuple[str, tuple[int, ...]]] = []
        for norm, linears in (
            ("ln_1", ("attn.c_attn", "attn.c_proj")),
            ("ln_2", ("mlp.c_fc", "mlp.c_proj")),
        ):
            kinds += [(f"{norm}.weight", (c.n_embd,)), (f"{norm}.bias", (c.n_embd,))]
            for linear in linears:
                rows, columns = (times * c.n_embd for times in wide[linear])
                kinds += [(f"{linear}.weight", (rows, columns)), (f"{linear}.bias", (rows,))]
        order = [
            ("transformer.wte.weight", (padded_vocab_size, c.n_embd)),
            ("transformer.wpe.weight", (c.block_size, c.n_embd)),
            *((f"transformer.h.{i}.{n}", shape) for n, shape in kinds for i in range(c.n_layer)),
            ("transformer.ln_f.weight", (c.n_embd,)),
            ("transformer.ln_f.bias", (c.n_embd,)),
        ]
        places, start = {}, 0
        for name, shape in order:
            places[name] = start, shape
            start += math.prod(shape)
        return places


class HuggingFaceWeights:
    """Safetensors files with the names that ``transformers`` gives GPT-2 and LLaMA.

    Args:
        path: A ``.safetensors`` file, or a directory with one or with several and their index.
        n_head: Heads of a GPT-2, whose packed matrix is ordered otherwise there; 0 for LLaMA.

    Raises:
        WrongWeights: There is no such file.
    """

    def __init__(self, path: Path, n_head: int = 0) -> None:
        self._path, self._n_head = path, n_head
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            self._files = {name: path / file for name, file in names.items()}
            return
        file = path / "model.safetensors" if path.is_dir() else path
        if not file.is_file():
            raise WrongWeights(f"{path}: found neither model.safetensors nor an index of several")
        with self._open(file) as opened:
            self._files = dict.fromkeys(opened.keys(), file)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor that the files have under this name, or under that of what it is tied to.

        Raises:
            WrongWeights: They have none, or one of another shape.
        """
        stored = next((other for other in _names_there(name) if other in self._files), None)
        if stored is None:
            raise WrongWeights(f"{self._path} has no {name}")
        with self._open(self._files[stored]) as opened:
            whole = opened.get_tensor(stored).float()
        if self._n_head and name.endswith(_TRANSPOSED):
            whole = whole.T.contiguous()
        if whole.shape != shape:
            raise WrongWeights(
                f"{self._path}: {stored} is {tuple(whole.shape)}, the model's is {tuple(shape)}"
            )
        return by_head(whole, self._n_head) if ".c_attn." in name else whole

    @staticmethod
    def _open(file: Path):  # noqa: ANN205 - a class of a library that only this source needs
        from safetensors import safe_open

        return safe_open(file, framework="pt")


_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def _names_there(name: str) -> tuple[str, ...]:
    """Published files of GPT-2 leave out the first word, and heads that are the embedding."""
    tied = {"lm_head.weight": ("transformer.wte.weight", "wte.weight", "model.embed_tokens.weight")}
    return name, name.removeprefix("transformer."), *tied.get(name, ())


def by_head(packed: Tensor, n_head: int) -> Tensor:
    """All q, then all k, then all v → q, k and v of one head after the other."""
    return packed.unflatten(0, (3, n_head, -1)).transpose(0, 1).flatten(0, 2)
