"""What torchtitan's trainer holds, as Statefuls whose state dicts are plain values and tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.components.dataloader import BaseDataLoader, ParallelAwareDataloader
from torchtitan.components.optimizer import OptimizersContainer

from dcp_resume.errors import ConfigurationError
from dcp_resume.format.leaves import decode_leaf, encode_leaf
from dcp_resume.interop.inert_pickle import load_inert
from dcp_resume.interop.torch_objects import plain, unknown_in
from dcp_resume.manager.stateful import Stateful
from dcp_resume.manifest.report import ReportItem, Severity

__all__ = ["LoaderPlace", "Model", "Optimizers", "loader_state"]


class Model:
    """The model parts of this rank, under the names that torchtitan gives them.

    Args:
        wrapper: torchtitan's own view of them.
    """

    def __init__(self, wrapper: ModelWrapper) -> None:
        self._wrapper = wrapper
        self.step_objects = tuple(wrapper.model)

    def state_dict(self) -> Mapping[str, Any]:
        """For saving, and as what a load writes to."""
        return dict(self._wrapper.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading."""
        self._wrapper.load_state_dict(dict(state_dict))


class Optimizers:
    """All optimizers of this rank, keyed by names of parameters, as torchtitan flattens them.

    Args:
        container: It is a ``torch.optim.Optimizer`` too, which numbers its parameters; that side
            of it is hidden here.
    """

    def __init__(self, container: OptimizersContainer) -> None:
        self._container = container
        self.step_objects = tuple(container)

    def state_dict(self) -> Mapping[str, Any]:
        """For saving, and as what a load writes to."""
        return dict(self._container.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading."""
        self._container.load_state_dict(dict(state_dict))


class LoaderPlace:
    """The place of a data-parallel rank in the data.

    torchtitan pickles it, and unpickles what a checkpoint holds. Here it is one JSON text of each
    data-parallel rank; of a checkpoint that torchtitan wrote the pickle is read, never executed.

    Args:
        loader: The trainer's.
    """

    def __init__(self, loader: ParallelAwareDataloader) -> None:
        self._loader = loader
        self._name = f"dp_rank_{loader.dp_rank}"

    def state_dict(self) -> Mapping[str, Any]:
        """For saving."""
        place = StatefulDataLoader.state_dict(self._loader)
        return {
            self._name: json.dumps(encode_leaf(place, self._name)),
            "world_size": self._loader.dp_world_size,
        }

    def differences(self, saved: Mapping[str, Any]) -> Iterator[ReportItem]:
        """Another data-parallel size, for which torchtitan's places mean nothing."""
        was, now = saved.get("world_size", self._loader.dp_world_size), self._loader.dp_world_size
        if was != now:
            message = (
                f"saved by {was} data-parallel ranks, now {now}: a rank's place in its share of "
                f"the data is no place in another share; begin the data anew with "
                f"--checkpoint.exclude_from_loading dataloader"
            )
            yield ReportItem(Severity.REFUSE, "data", "world_size", message)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """For loading.

        Raises:
            ConfigurationError: The pickle of another writer holds objects.
            InvalidDocument: The text is malformed.
        """
        StatefulDataLoader.load_state_dict(self._loader, self._read(state_dict[self._name]))

    def _read(self, stored: Any) -> Any:
        if not isinstance(stored, bytes):
            return decode_leaf(json.loads(stored), self._name)
        place = plain(load_inert(stored))
        unknown = unknown_in(place)
        if unknown is not None:
            raise ConfigurationError(
                f"the imported place of {self._name} in the data holds a {unknown}, which is never "
                f"executed; begin the data anew with --checkpoint.exclude_from_loading dataloader",
                option="checkpoint.exclude_from_loading",
            )
        return place


def loader_state(loader: BaseDataLoader) -> Stateful:
    """The place of a loader: our form of it, or a loader of another kind as it is."""
    own: Callable[[Any], Stateful] = LoaderPlace
    return own(loader) if isinstance(loader, ParallelAwareDataloader) else loader
