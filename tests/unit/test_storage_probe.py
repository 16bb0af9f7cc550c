"""The probe of exclusive create: what it finds."""

from __future__ import annotations

from threading import Barrier, Lock
from typing import Any

import pytest

from dcp_resume.errors import KeyExists, UnsupportedStore
from dcp_resume.storage import check_exclusive_create, open_store


class LooksFirst:
    """Looks whether a key is there, and then writes: two at once both find nothing."""

    def __init__(self, store: Any) -> None:
        self._store, self._lock = store, Lock()
        self._gates: dict[str, Barrier] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def create(self, key: str, data: bytes) -> None:
        if any(info.key == key for info in self._store.list(key)):
            raise KeyExists("taken", url=self._store.url, key=key)
        if "-race-" in key:
            with self._lock:
                gate = self._gates.setdefault(key, Barrier(2))
            gate.wait()
        self._store.write(key, [memoryview(data)])


def test_a_store_that_looks_before_it_writes_is_refused_and_left_clean(tmp_path: Any) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(UnsupportedStore, match="2 of 2 racing creates won") as refused:
        check_exclusive_create(LooksFirst(store), "probe")  # type: ignore[arg-type]
    assert refused.value.key.startswith("probe/")
    assert list(store.list("")) == []
