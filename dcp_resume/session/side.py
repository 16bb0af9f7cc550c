"""One of two checkpoints that are compared, and the non-tensor leaves it holds of every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from dcp_resume.errors import CorruptData
from dcp_resume.format.leaves import unpack_leaves
from dcp_resume.manifest.boxes import Box
from dcp_resume.manifest.models import TensorEntry
from dcp_resume.manifest.signing import ANYONE, Trust
from dcp_resume.planning.box_rows import unpad_box
from dcp_resume.planning.state import PER_RANK_LEAVES, SHARED_LEAVES
from dcp_resume.planning.ties import Ties
from dcp_resume.problems import summarise
from dcp_resume.session.finding import find_checkpoints
from dcp_resume.session.opening import OpenedCheckpoint, open_checkpoint
from dcp_resume.session.reading import read_targets
from dcp_resume.session.selecting import Request
from dcp_resume.session.targets import Target
from dcp_resume.session.values import StoredValue
from dcp_resume.storage import ObjectStore

__all__ = ["Side", "Values", "open_side"]

Values: TypeAlias = dict[str, StoredValue]
"""FQN → key path and encoded value."""


@dataclass(frozen=True)
class Side:
    """An opened checkpoint, and the store it lies in."""

    store: ObjectStore
    opened: OpenedCheckpoint

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return self.opened.manifest.topology.world_size

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """The tensors of the state by FQN, tied names too; not those that hold packed values."""
        return {e.fqn: e for e in self.opened.catalog.tensors if e.codec == "raw"}

    @cached_property
    def ties(self) -> Ties:
        """The names that the checkpoint has for one tensor, and for what belongs to it."""
        names = {fqn: entry.alias_of for fqn, entry in self.tensors.items() if entry.alias_of}
        return Ties(names, list(self.tensors))

    @cached_property
    def shared_values(self) -> Values:
        """The values that all ranks share.

        Raises:
            CorruptData: A block that holds values is damaged.
            InvalidDocument: The packed values are malformed.
            StorageError: The store failed.
        """
        values: Values = {leaf.fqn: (leaf.path, leaf.value) for leaf in self.opened.manifest.leaves}
        packed = [
            (entry.fqn, Box.whole(entry.global_shape))
            for entry in self._packed()
            if entry.fqn.startswith(SHARED_LEAVES)
        ]
        return values | self._unpack(packed)

    @cached_property
    def per_rank_parts(self) -> tuple[str, ...]:
        """The parts that hold values of each rank's own."""
        names = (e.fqn for e in self._packed() if e.fqn.startswith(PER_RANK_LEAVES))
        return tuple(name.removeprefix(PER_RANK_LEAVES) for name in names)

    def values_of(self, rank: int) -> Values:
        """The values of a rank's own.

        Raises:
            CorruptData: A block that holds values is damaged.
            InvalidDocument: The packed values are malformed.
            StorageError: The store failed.
        """
        return self._unpack(self._by_rank.get(rank, ()))

    @cached_property
    def _by_rank(self) -> dict[int, list[tuple[str, Box]]]:
        opened, index = self.opened, self.opened.index
        found: dict[int, list[tuple[str, Box]]] = {}
        for entry in self._packed():
            if not entry.fqn.startswith(PER_RANK_LEAVES):
                continue
            for chunk in index.chunks_of(opened.tensor_ids[entry.fqn]).tolist():
                code = index.chunk_box[chunk]
                box = unpad_box(index.box_offsets[code], index.box_sizes[code], 1)
                rank = opened.catalog.files[int(index.chunk_file[chunk])].rank
                found.setdefault(rank, []).append((entry.fqn, box))
        return found

    def _packed(self) -> list[TensorEntry]:
        return [entry for entry in self.opened.catalog.tensors if entry.codec == "leaves"]

    def _unpack(self, packed: Sequence[tuple[str, Box]]) -> Values:
        targets = [
            Target(fqn, box, memoryview(bytearray(box.volume)), None, None) for fqn, box in packed
        ]
        self.read(targets)
        values: Values = {}
        for target in targets:
            values.update(unpack_leaves(bytes(target.memory), target.fqn))
        return values

    def read(self, targets: Sequence[Target]) -> None:
        """Fill targets by verified reads.

        Raises:
            CorruptData: A block is damaged.
            StorageError: The store failed.
        """
        outcome = read_targets(self.store, self.opened, targets)
        if outcome.problems:
            raise CorruptData(
                f"step {self.opened.manifest.step} of {self.store.url} is damaged and cannot be "
                f"compared:\n{summarise(outcome.problems)}\ncompare another step",
                problems=tuple(outcome.problems),
            )


def open_side(store: ObjectStore, request: Request, trust: Trust = ANYONE) -> Side:
    """Find and open one of the checkpoints to compare.

    Raises:
        CheckpointNotFound: None answers the request.
        InvalidCheckpoint: Its documents or its files are damaged, or not signed by whom the
            policy trusts.
        StorageError: The store failed.
    """
    (located,) = find_checkpoints(store, request, trust)
    return Side(store, open_checkpoint(store, located.prefix, located.manifest, trust=trust))
