"""Find a foreign checkpoint, tell its format by what lies there, and open it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dcp_resume.errors import KeyNotFound
from dcp_resume.interop.dcp_directory import METADATA_NAME, read_dcp
from dcp_resume.interop.foreign import Foreign, Source
from dcp_resume.interop.formats import Format
from dcp_resume.interop.infinitrain import MODEL_NAME, read_infinitrain
from dcp_resume.interop.llmc import MAGIC, read_llmc
from dcp_resume.interop.megatron import COMMON_NAME, CONFIG_NAME, read_megatron
from dcp_resume.interop.safetensors import read_safetensors
from dcp_resume.interop.torch_file import read_torch
from dcp_resume.interop.torch_shards import BIN_INDEX_NAME, BIN_NAME, read_torch_shards
from dcp_resume.storage import ObjectStore

__all__ = ["detect_format", "locate_source", "open_foreign", "split_url"]

_READERS: Mapping[Format, Callable[[Source], Foreign]] = {
    Format.SAFETENSORS: read_safetensors,
    Format.TORCH: lambda source: read_torch(source) if source.key else read_torch_shards(source),
    Format.DCP: read_dcp,
    Format.MEGATRON: read_megatron,
    Format.LLMC: read_llmc,
    Format.INFINITRAIN: read_infinitrain,
}


def split_url(url: str) -> tuple[str, str]:
    """The URL of what a file lies in, and its name."""
    parent, mark, name = url.rstrip("/").rpartition("/")
    if not mark:
        return ".", name
    return parent or "/", name


def locate_source(url: str, open_url: Callable[[str], ObjectStore]) -> Source:
    """A file if there is one under the URL, else a directory.

    Args:
        url: A path or a URL.
        open_url: Opens the store of a URL.

    Raises:
        ConfigurationError: The URL cannot work.
        StorageError: The store failed.
    """
    parent, name = split_url(url)
    if name not in ("", ".", "..") and not parent.endswith(":/"):
        store = open_url(parent)
        try:
            store.size(name)
            return Source(store, name)
        except KeyNotFound:
            store.close()
    return Source(open_url(url), "")


def detect_format(source: Source) -> Format:
    """Tell the format by the names in a directory, or the first bytes of a file.

    Raises:
        ForeignFormat: None that is known; the error says what was found.
        StorageError: The store failed.
    """
    return _of_file(source) if source.key else _of_directory(source)


def _of_directory(source: Source) -> Format:
    names = set(source.sizes())
    if METADATA_NAME in names:
        is_megatron = COMMON_NAME in names and CONFIG_NAME in names
        return Format.MEGATRON if is_megatron else Format.DCP
    if any(name.startswith("log/") for name in names):
        raise source.wrong_format("a foreign checkpoint", "a run of dcp_resume: it has a log")
    if any("/" not in name and name.endswith(".safetensors") for name in names):
        return Format.SAFETENSORS
    if names & {BIN_NAME, BIN_INDEX_NAME}:
        return Format.TORCH
    if names & {MODEL_NAME, f"rank_000000/{MODEL_NAME}"}:
        return Format.INFINITRAIN
    found = ", ".join(sorted(names)[:5]) or "nothing"
    raise source.wrong_format("a checkpoint directory", f"a place that holds {found}")


def _of_file(source: Source) -> Format:
    size = source.sizes()[source.key]
    head = source.read(source.key, 0, min(16, size))
    if head[:4] == b"PK\3\4":
        return Format.TORCH
    if head[:4] == MAGIC.to_bytes(4, "little"):
        return Format.LLMC
    if head[8:9] == b"{":
        return Format.SAFETENSORS
    if head[:1] == b"\x80":
        found = "a bare pickle, as torch.save wrote before 1.6; save it with a newer torch"
        raise source.wrong_format("a checkpoint file", found)
    raise source.wrong_format("a checkpoint file", f"a file that begins with {head!r}")


def open_foreign(source: Source, form: Format | None = None) -> Foreign:
    """Open a foreign checkpoint; nothing of a tensor is read.

    Args:
        source: Where it lies.
        form: Its format; None to detect it.

    Raises:
        ForeignFormat: It is of another format, or of none that is known.
        ForeignDamage: It contradicts itself, or names what is outside of it.
        StorageError: The store failed.
    """
    detected = detect_format(source)
    is_subset = form is Format.DCP and detected is Format.MEGATRON
    if form is not None and form is not detected and not is_subset:
        raise source.wrong_format(f"the format {form.value}", f"of the format {detected.value}")
    return _READERS[form or detected](source)
