"""Model files of llm.c: 256 numbers of 32 bits, then tensors without names, in a fixed order.

Each kind of tensor lies there for all layers together. Names are those of the program that defines
the file; linear weights are ``[out, in]``. The vocabulary is padded with rows of zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from dcp_resume.errors import Problem, Unheld
from dcp_resume.format.dtypes import ITEMSIZES
from dcp_resume.interop.foreign import Foreign, ForeignTensor, Region, Source, row_major
from dcp_resume.interop.formats import Format
from dcp_resume.interop.outgoing import Outgoing, OutgoingFile, OutgoingTensor, Segment
from dcp_resume.manifest.boxes import Box
from dcp_resume.problems import summarise

__all__ = ["MAGIC", "lay_out_llmc", "read_llmc"]

MAGIC = 20240326
HEADER_BYTES = 256 * 4
PADDED_TO = 128
_DTYPES = {3: "float32", 5: "bfloat16"}
_FACTS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "padded_vocab_size")
_EMBEDDING = "transformer.wte.weight"
_HEAD = "lm_head.weight"

Shape = tuple[int, ...]


def _order(facts: dict[str, int], rows: int) -> Iterator[tuple[str, Shape]]:
    """Names and shapes in the order of the file; layers of one kind follow one another."""
    width, layers = facts["n_embd"], range(facts["n_layer"])
    yield _EMBEDDING, (rows, width)
    yield "transformer.wpe.weight", (facts["block_size"], width)
    kinds: list[tuple[str, Shape]] = []
    for norm, linears in (
        ("ln_1", (("attn.c_attn", 3, 1), ("attn.c_proj", 1, 1))),
        ("ln_2", (("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4))),
    ):
        kinds += [(f"{norm}.weight", (width,)), (f"{norm}.bias", (width,))]
        for name, wide, deep in linears:
            kinds.append((f"{name}.weight", (wide * width, deep * width)))
            kinds.append((f"{name}.bias", (wide * width,)))
    for name, shape in kinds:
        for layer in layers:
            yield f"transformer.h.{layer}.{name}", shape
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)


def read_llmc(source: Source) -> Foreign:
    """Open a file; rows of padding are left out.

    Raises:
        ForeignFormat: Another kind of file, or another version.
        ForeignDamage: It has another length than its header says.
        StorageError: The store failed.
    """
    sizes = source.sizes()
    size = sizes[source.key]
    if size < HEADER_BYTES:
        raise source.wrong_format("a model file of llm.c", f"a file of {size} bytes")
    header = struct.unpack("<256i", source.read(source.key, 0, HEADER_BYTES))
    if header[0] != MAGIC or header[1] not in _DTYPES:
        found = f"a file that begins with {header[0]}, {header[1]}"
        raise source.wrong_format(f"{MAGIC} and version 3 or 5", found)
    dtype, facts = _DTYPES[header[1]], dict(zip(_FACTS, header[2:8], strict=True))
    if min(facts.values()) <= 0 or facts["vocab_size"] > facts["padded_vocab_size"]:
        raise source.damage([Problem(source.key, "header", f"found {facts}")])
    if facts["n_layer"] > 100_000:
        raise source.damage([Problem(source.key, "cap", f"{facts['n_layer']} layers")])
    tensors: dict[str, ForeignTensor] = {}
    at = HEADER_BYTES
    for name, shape in _order(facts, facts["padded_vocab_size"]):
        kept = (facts["vocab_size"], shape[1]) if name == _EMBEDDING else shape
        region = Region(Box.whole(kept), source.key, at, row_major(kept))
        tensors[name] = ForeignTensor((name,), dtype, kept, (region,))
        at += Box.whole(shape).volume * ITEMSIZES[dtype]
    if at != size:
        message = f"its header says {at} bytes, found {size}"
        raise source.damage([Problem(source.key, "size", message)])
    tensors[_HEAD] = tensors[_EMBEDDING]
    named = {n: ForeignTensor((n,), t.dtype, t.shape, t.regions) for n, t in tensors.items()}
    ties = {_HEAD: _EMBEDDING}
    del facts["padded_vocab_size"]
    return Foreign(source, Format.LLMC, named, ties=ties, model=facts).checked(sizes)


def lay_out_llmc(outgoing: Outgoing, name: str, url: str) -> list[OutgoingFile]:
    """The one file of an export.

    Args:
        outgoing: A model with exactly the names and shapes of the format, and ``n_head`` among its
            model facts, of float32 or of bfloat16 alone.
        name: Of the file.
        url: Of the target, for messages.

    Raises:
        Unheld: The model is another one; every difference is listed.
    """
    tensors = {tensor.name: tensor for tensor in outgoing.tensors}
    tensors.update((name, tensors[first]) for name, (_, first) in outgoing.ties.items())
    if tensors.get(_HEAD) is tensors.get(_EMBEDDING):
        tensors.pop(_HEAD, None)
    problems, facts = _facts_of(tensors, outgoing.model)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES.values()):
        problems.append(Problem("dtype", "dtype", f"expected one of 3 or 5, found {dtypes}"))
    expected = dict(_order(facts, facts["vocab_size"])) if not problems else {}
    for fqn in sorted({*expected, *tensors}) if not problems else ():
        found = tensors[fqn].shape if fqn in tensors else None
        is_head = fqn == _HEAD
        if is_head or found != expected.get(fqn):
            message = f"expected {expected.get(fqn)}, found {found}"
            problems.append(Problem(fqn, "untied" if is_head else "shape", message))
    if problems:
        raise Unheld(
            f"a model file of llm.c cannot hold this model; nothing was written:\n"
            f"{summarise(problems)}\nexport the part of the model alone, or to another format",
            url=url,
            problems=tuple(problems),
        )
    (dtype,) = dtypes
    version = next(number for number, known in _DTYPES.items() if known == dtype)
    padded = -(-facts["vocab_size"] // PADDED_TO) * PADDED_TO
    numbers = [MAGIC, version, *(facts[key] for key in _FACTS[:5]), padded]
    header = struct.pack("<256i", *numbers, *(0 for _ in range(256 - len(numbers))))
    segments: list[Segment] = [header]
    for fqn in expected:
        segments.append(tensors[fqn].stored)
        if fqn == _EMBEDDING:
            rows = padded - facts["vocab_size"]
            segments.append(bytes(rows * facts["n_embd"] * ITEMSIZES[dtype]))
    return [OutgoingFile(name, tuple(segments))]


def _facts_of(
    tensors: Mapping[str, OutgoingTensor], model: Mapping[str, object]
) -> tuple[list[Problem], dict[str, int]]:
    """Sizes by the tensors; the number of heads is in no shape."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    problems = [
        Problem(name, "missing", "the format cannot do without it")
        for name in (_EMBEDDING, "transformer.wpe.weight")
        if len(shapes.get(name, ())) != 2
    ]
    heads = model.get("n_head")
    if not isinstance(heads, int) or heads < 1:
        problems.append(Problem("n_head", "fact", "the checkpoint's model facts do not say it"))
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
    if problems or not isinstance(heads, int):
        return problems, {}
    rows, width = shapes[_EMBEDDING]
    block_size = shapes["transformer.wpe.weight"][0]
    return [], dict(zip(_FACTS, (block_size, rows, len(layers), heads, width), strict=False))
