"""The digests of tensors that lie in the memory of many ranks.

1. Offer (every rank). Each rank says which boxes it holds. Where boxes overlap without being equal
   (ranges of flat buffers on two pipeline stages), the coordinator cuts them into disjoint cells.
2. Digest (every rank). Each rank digests its cells. The coordinator finds cells of which ranks hold
   different copies, counts equal copies once, and adds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from dcp_resume.errors import Problem
from dcp_resume.format.position_digest import PositionDigest
from dcp_resume.manifest.boxes import Box
from dcp_resume.planning.cells import disjoint_cells
from dcp_resume.planning.held import HeldPiece, narrowed
from dcp_resume.planning.padding import inside_of
from dcp_resume.session.box_digests import digest_view
from dcp_resume.session.votes import Votes

__all__ = ["HeldMemory", "HeldTotals", "digest_held"]

NUM_DIGESTERS = 4


@dataclass(frozen=True, slots=True)
class HeldMemory:
    """What a rank holds of one tensor."""

    fqn: str
    """Of the tensor; of several names that are one tensor the same on all ranks."""
    names: tuple[str, ...]
    """Of the tensor on this rank."""
    shape: tuple[int, ...]
    """Without padding."""
    itemsize: int
    """Bytes of an element."""
    pieces: tuple[HeldPiece, ...]
    """None where the rank holds nothing of it, or shall not be asked."""

    def boxes(self) -> Iterator[tuple[Box, HeldPiece]]:
        """What is held, without padding and without what is empty."""
        for piece in self.pieces:
            inside = inside_of(piece.box, self.shape)
            if inside is not None and inside.volume:
                yield inside, piece

    def views(self, cells: Sequence[Box]) -> Iterator[tuple[Box, torch.Tensor]]:
        """Each of the cells that is held, or each held box if there are none, and its memory."""
        for inside, piece in self.boxes():
            for cell in cells or [inside]:
                if inside.contains(cell):
                    yield cell, narrowed(piece.memory, cell.relative_to(piece.box))


@dataclass(slots=True)
class HeldTotals:
    """What all ranks hold together."""

    digests: dict[str, PositionDigest] = field(default_factory=dict)
    """FQN → digest of the whole tensor; not of those with a problem."""
    first_names: dict[str, str] = field(default_factory=dict)
    """Every name on any rank → FQN of the tensor."""
    problems: list[Problem] = field(default_factory=list)
    """Tensors whose digest cannot be told: ``replica``, of which ranks hold different copies, and
    ``hole``, of which they lack elements."""


def digest_held(
    votes: Votes, held: Sequence[HeldMemory], decide: Callable[[HeldTotals], bytes]
) -> bytes:
    """Digest the ranks' tensors, every element counted once.

    Args:
        votes: Rounds of which two are held here.
        held: This rank's.
        decide: Called on the coordinator; what it returns every rank gets.

    Raises:
        RankErrors: A rank could not read its memory.
        RankSilent: A rank did not answer by the deadline.
        DcpResumeError: What ``decide`` raised, on every rank alike.
    """
    offers = _Offers()

    def offer() -> bytes:
        rows = [
            [own.fqn, own.names, own.shape, [_row(box) for box, _ in own.boxes()]] for own in held
        ]
        return json.dumps(rows).encode()

    cut = json.loads(votes.round("offer", offer, offers.cells))

    def digest() -> bytes:
        cells = {fqn: [_box(row) for row in rows] for fqn, rows in cut.items()}
        with ThreadPoolExecutor(NUM_DIGESTERS, "dcp-resume-digest") as pool:
            found = [
                (own.fqn, cell, pool.submit(digest_view, view, own.itemsize, cell, own.shape))
                for own in held
                for cell, view in own.views(cells.get(own.fqn, ()))
            ]
            rows = [[fqn, _row(cell), future.result().hex] for fqn, cell, future in found]
        return json.dumps(rows).encode()

    def add(ballots: Sequence[bytes]) -> list[bytes]:
        return [decide(offers.totals(ballots))] * len(ballots)

    return votes.round("digest", digest, add)


class _Offers:
    """The coordinator's knowledge of who holds what."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def cells(self, ballots: Sequence[bytes]) -> list[bytes]:
        """FQN → disjoint cells, of tensors whose distinct boxes overlap."""
        boxes: dict[str, dict[Box, None]] = {}
        for ballot in ballots:
            for fqn, names, shape, rows in json.loads(ballot):
                self._names.update(dict.fromkeys(names, fqn))
                self._shapes[fqn] = tuple(shape)
                boxes.setdefault(fqn, {}).update(dict.fromkeys(map(_box, rows)))
        cut: dict[str, list[list[tuple[int, ...]]]] = {}
        for fqn, distinct in boxes.items():
            own = list(distinct)
            cells = disjoint_cells(own)
            if cells != own:
                cut[fqn] = [_row(cell) for cell in cells]
        return [json.dumps(cut).encode()] * len(ballots)

    def totals(self, ballots: Sequence[bytes]) -> HeldTotals:
        """What the ranks' digests of their cells add up to."""
        copies: dict[str, dict[Box, dict[str, list[int]]]] = {fqn: {} for fqn in self._shapes}
        for rank, ballot in enumerate(ballots):
            for fqn, row, digest in json.loads(ballot):
                copies[fqn].setdefault(_box(row), {}).setdefault(digest, []).append(rank)
        totals = HeldTotals(first_names=self._names)
        for fqn, cells in copies.items():
            expected = math.prod(self._shapes[fqn])
            covered = sum(cell.volume for cell in cells)
            torn = {cell: found for cell, found in cells.items() if len(found) > 1}
            if torn:
                cell, found = next(iter(torn.items()))
                groups = " and ".join(f"ranks {ranks}" for ranks in found.values())
                message = f"{groups} hold different values of {cell}"
                totals.problems.append(Problem(fqn, "replica", message))
            elif covered != expected:
                message = f"it has {expected} elements, the ranks hold {covered}"
                totals.problems.append(Problem(fqn, "hole", message))
            else:
                digests = [PositionDigest.from_hex(*found) for found in cells.values()]
                totals.digests[fqn] = sum(digests, PositionDigest())
        return totals


def _row(box: Box) -> list[tuple[int, ...]]:
    return [box.offsets, box.sizes]


def _box(row: Sequence[Sequence[int]]) -> Box:
    return Box(tuple(row[0]), tuple(row[1]))
