"""Atomic, verified, reshardable checkpoints for PyTorch training jobs that get preempted.

Public names are resolved on first use, so that ``import dcp_resume`` and
``import dcp_resume.manifest`` load neither torch nor a storage library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dcp_resume import errors, events
else:
    import importlib

    _HOMES = {
        "errors": "dcp_resume.errors",
        "events": "dcp_resume.events",
    }

    def __getattr__(name: str) -> object:
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module 'dcp_resume' has no attribute {name!r}")
        module = importlib.import_module(home)
        return module if home.endswith(f".{name}") else getattr(module, name)


__all__ = ["errors", "events"]
