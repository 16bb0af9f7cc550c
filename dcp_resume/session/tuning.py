"""What the library chose by itself for one store, told once to whoever listens."""

from __future__ import annotations

from dcp_resume.events import Choice, TuningChosen, emit
from dcp_resume.session.own_cores import own_cores
from dcp_resume.session.reading import NUM_READERS
from dcp_resume.storage import ObjectStore
from dcp_resume.storage.tuned import Tuned

__all__ = ["tell_choices"]


def tell_choices(store: ObjectStore) -> None:
    """Tell how a store that was just proved is worked with."""
    early = min(NUM_READERS, own_cores())
    choices = [
        Choice("create", "exclusive", "", "the probe had one winner for every key"),
        Choice("read", store.read_bytes, "bytes", "what a request of this store is worth"),
        Choice("readers", NUM_READERS, "", f"once one has to wait; until then {early}, by cores"),
        Choice("writers", 1, "", "one file of a rank at a time"),
        *(store.choices if isinstance(store, Tuned) else ()),
    ]
    emit(TuningChosen(url=store.url, choices=tuple(choices)))
