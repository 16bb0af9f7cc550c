"""Flip single bits of a run's files, one at a time: each must be found, and none may be loaded.

    python -m tests.campaigns.bit_flips --flips 10000 --seed 1

Files are drawn evenly, then a bit of the file. For each flip ``verify`` must name the file, and a
load must either refuse with an error of ours or give every tensor and value exactly.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcp_resume import CheckpointManager, SaveMode, Settings, open_store
from dcp_resume.errors import DcpResumeError
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.verify import verify_checkpoint

__all__ = ["BitFlip", "Outcome", "flip_bits", "make_run"]

STEP = 2
DOCUMENTS = ("manifest.json", "catalog.json", "chunk-index")


@dataclass(frozen=True)
class BitFlip:
    """One bit of one file."""

    key: str
    byte: int
    bit: int

    @property
    def kind(self) -> str:
        """What the file is."""
        if self.key.startswith("log/"):
            return "log record"
        name = self.key.rpartition("/")[2]
        return name if name in DOCUMENTS else "data file"


@dataclass(frozen=True)
class Outcome:
    """What came of a flip."""

    flip: BitFlip
    is_named: bool
    """Whether ``verify`` named the file."""
    load: str
    """``exact``, ``wrong``, or the error that refused it."""

    @property
    def is_found(self) -> bool:
        """Whether the damage was told, and did not get into a state."""
        return self.is_named and self.load != "wrong"


def state_of(step: int) -> dict[str, Any]:
    """Tensors of several sizes and types, some of several blocks, and values."""
    fill = torch.Generator().manual_seed(step)
    return {
        "model": {
            "wide": torch.rand(300, 200, generator=fill),
            "half": torch.rand(70, 3, generator=fill).bfloat16(),
            "scalar": torch.tensor(7 * step),
        },
        "optim": {"exp_avg": torch.rand(300, 200, generator=fill, dtype=torch.float64)},
        "data": {"epoch": step, "order": [1, 2.5, (step, None)], "name": "größe"},
    }


def make_run(root: Path) -> None:
    """Save a step in each of two generations, so that every kind of file is there."""
    settings = Settings(mode=SaveMode.BLOCKING)
    with CheckpointManager(root, settings) as checkpoints:
        checkpoints.save(1, state_of(1))
    with CheckpointManager(root, settings) as checkpoints:
        checkpoints.resume(state_of(0))
        checkpoints.save(STEP, state_of(STEP))


def flip_bits(root: Path, *, flips: int, seed: int) -> Iterator[Outcome]:
    """Flip, look, and put the bit back, so many times."""
    draw = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
    for _ in range(flips):
        path = draw.choice(files)
        flip = BitFlip(
            path.relative_to(root).as_posix(),
            draw.randrange(path.stat().st_size),
            draw.randrange(8),
        )
        with _flipped(path, flip):
            yield Outcome(flip, _names_of(root, flip.key), _load(root, flip.key))


@contextmanager
def _flipped(path: Path, flip: BitFlip) -> Iterator[None]:
    with path.open("r+b", buffering=0) as file:
        file.seek(flip.byte)
        whole = file.read(1)
        file.seek(flip.byte)
        file.write(bytes([whole[0] ^ 1 << flip.bit]))
        try:
            yield
        finally:
            file.seek(flip.byte)
            file.write(whole)


def _names_of(root: Path, key: str) -> bool:
    """Whether verification of the whole run names the file."""
    store = open_store(str(root))
    try:
        found = [verify_checkpoint(store, located) for located in find_checkpoints(store, "all")]
    except DcpResumeError as error:
        return key in str(error)
    return any(p.where.startswith(key) for result in found for p in result.problems)


def _load(root: Path, key: str) -> str:
    """Load the checkpoint that the file belongs to."""
    step = 1 if key.startswith(f"step-{1:08}/") else STEP
    state = state_of(0)
    with CheckpointManager(root) as checkpoints:
        try:
            checkpoints.load(state, step)
        except DcpResumeError as error:
            return type(error).__name__
    return "exact" if _is_equal(state, state_of(step)) else "wrong"


def _is_equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _is_equal(found[name], value) for name, value in expected.items()
        )
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    return type(found) is type(expected) and found == expected


def main() -> int:
    """Run the campaign and print what came of it, by kind of file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    started = time.monotonic()
    counts: Counter[tuple[str, str]] = Counter()
    missed: list[Outcome] = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "run"
        make_run(root)
        for outcome in flip_bits(root, flips=arguments.flips, seed=arguments.seed):
            counts[outcome.flip.kind, outcome.load] += 1
            if not outcome.is_found:
                missed.append(outcome)
                print("MISSED", outcome, flush=True)
    for (kind, load), count in sorted(counts.items()):
        print(f"{kind:14} load: {load:18} {count:6}")
    seconds = time.monotonic() - started
    print(f"seed {arguments.seed}: {arguments.flips} flips, {len(missed)} missed, {seconds:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
