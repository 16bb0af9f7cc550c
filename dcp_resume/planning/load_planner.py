"""DCP's LoadPlanner with the checks it lacks: coverage, dtype, and no unpickling."""

from __future__ import annotations

import io
import math
from collections import Counter

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.tensor import DTensor

from dcp_resume.errors import LoadRefused, Problem
from dcp_resume.problems import summarise

__all__ = ["LoadPlanner"]


class LoadPlanner(DefaultLoadPlanner):
    """Plans a load for ``dcp.load(…, planner=…)``, with our reader or any other.

    DCP's default planner casts dtypes in silence, and leaves the old values where a checkpoint has
    a hole; this one refuses both, all tensors at once, before anything is read.
    """

    def create_local_plan(self) -> LoadPlan:
        """Plan this rank's reads.

        Raises:
            LoadRefused: Tensors differ in dtype from what was saved, or are not wholly covered.
        """
        plan = super().create_local_plan()
        covered: Counter[str] = Counter()
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                covered[item.dest_index.fqn] += math.prod(item.lengths)
        problems: list[Problem] = []
        for fqn, value in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(fqn) if self.metadata else None
            if not isinstance(value, torch.Tensor) or not isinstance(stored, TensorStorageMetadata):
                continue
            if stored.properties.dtype != value.dtype:
                message = f"saved as {stored.properties.dtype}, the state has {value.dtype}"
                problems.append(Problem(fqn, "dtype", message))
            wanted = value.to_local().numel() if isinstance(value, DTensor) else value.numel()
            if covered[fqn] != wanted:
                message = f"{covered[fqn]} of {wanted} elements of this rank are in the checkpoint"
                problems.append(Problem(fqn, "hole", message))
        if problems:
            raise LoadRefused(
                f"the checkpoint does not fit the state; nothing was changed:\n"
                f"{summarise(problems)}",
                problems=tuple(problems),
            )
        return plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse pickled bytes of another library's checkpoint.

        Raises:
            LoadRefused: Always. Our own reader sets values without this call.
        """
        problem = Problem(read_item.dest_index.fqn, "pickle", "the stored value is pickled")
        raise LoadRefused(
            f"{problem}; this planner never unpickles. Load it with DCP's own planner if you "
            f"trust the checkpoint, and save it again",
            problems=(problem,),
        )
