"""DCP's SavePlanner over our planning: columns for our writer, ordinary items for any other."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan

from dcp_resume.planning.declarations import Declarations
from dcp_resume.planning.local_plans import local_plan
from dcp_resume.planning.plans import LocalPlan
from dcp_resume.planning.state import LocalState, describe_state

__all__ = ["ColumnarStorageMeta", "SavePlanner"]


class ColumnarStorageMeta(StorageMeta):
    """What our writer's ``storage_meta`` returns: a planner that sees it may plan in columns."""


class SavePlanner(DefaultSavePlanner):
    """Plans a save for ``dcp.save(…, planner=…)``.

    With our writer each rank sends columns, and the writer merges them on the coordinator; the
    ``Metadata`` that ``dcp.save`` returns is then empty, because the checkpoint describes itself.
    With any other writer it plans as DCP's default planner does.

    Args:
        declarations: What the caller knows of leaves and torch does not say.
        options: Passed to ``DefaultSavePlanner``.
    """

    def __init__(self, declarations: Declarations | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.declarations = declarations or Declarations()
        self.local_state: LocalState | None = None
        """This rank's state, in the columnar mode; the writer takes the bytes from it."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Begin a save.

        Raises:
            StateError: The state cannot be saved as it is.
        """
        self.local_state = None
        if isinstance(storage_meta, ColumnarStorageMeta):
            self.local_state = describe_state(state_dict, self.declarations)
            self.original_state_dict = state_dict
            self.is_coordinator = is_coordinator
        else:
            super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        """Plan what this rank offers."""
        if self.local_state is None:
            return super().create_local_plan()
        is_alone = not (dist.is_available() and dist.is_initialized())
        plan = local_plan(
            self.local_state,
            0 if is_alone else dist.get_rank(),
            1 if is_alone else dist.get_world_size(),
            self.declarations,
        )
        return SavePlan([], planner_data=plan.to_bytes())

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Pass columns on to the writer, which merges them; plan items as DCP does."""
        if self.local_state is None:
            return super().create_global_plan(all_plans)
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take this rank's part."""
        return super().finish_plan(new_plan) if self.local_state is None else new_plan


def columns_of(plan: SavePlan) -> LocalPlan | None:
    """The columns a plan carries; None for a plan of ordinary items."""
    is_columnar = isinstance(plan.planner_data, bytes)
    return LocalPlan.from_bytes(plan.planner_data) if is_columnar else None
