"""The index beside the shards of a Hugging Face model: which file holds which name."""

from __future__ import annotations

from collections.abc import Mapping

from dcp_resume.errors import Problem
from dcp_resume.format.strict_json import load_strict
from dcp_resume.interop.foreign import Source

__all__ = ["index_problems", "read_weight_map"]

MAX_INDEX_BYTES = 100_000_000


def read_weight_map(source: Source, index: str) -> dict[str, str]:
    """Name of each tensor → the file that holds it.

    Raises:
        ForeignDamage: Malformed, or it names what is outside of the directory.
        StorageError: The store failed.
    """
    data = source.read_whole(index, MAX_INDEX_BYTES)
    try:
        named = load_strict(data)["weight_map"]
        files = {*named.values()}
        if not all(isinstance(file, str) and "/" not in file for file in files):
            raise ValueError("the weight_map names more than files of this directory")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise source.damage([Problem(index, "index", f"malformed ({error})")]) from error
    return dict(named)


def index_problems(
    named: Mapping[str, str], places: Mapping[str, str], sizes: Mapping[str, int]
) -> list[Problem]:
    """In what an index differs from what its files hold.

    Args:
        named: What the index says.
        places: Name of each tensor that was found → its file.
        sizes: Of the files of the directory. A name may lie elsewhere than the index says, if what
            it says is a file: some writers leave a tie in either.
    """
    problems = []
    for name in sorted({*named, *places}):
        there, said = places.get(name), named.get(name)
        if said is None:
            problems.append(Problem(name, "index", f"it lies in {there}, the index leaves it out"))
        elif there is None or (there != said and said not in sizes):
            message = f"the index says {said!r:.80}, where it is not"
            problems.append(Problem(name, "index", message))
    return problems
