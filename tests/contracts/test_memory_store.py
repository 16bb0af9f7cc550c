"""``memory://`` keeps the contract through the generic fsspec store."""

from __future__ import annotations

import uuid

import fsspec
import pytest

from dcp_resume.storage import open_store
from tests.contracts.object_store import ObjectStoreContract


class TestMemoryStore(ObjectStoreContract):
    race_rounds = 200

    @pytest.fixture(autouse=True)
    def _root(self):
        self.files = fsspec.filesystem("memory")
        self.root = f"/{uuid.uuid4().hex}"
        yield
        if self.files.exists(self.root):
            self.files.rm(self.root, recursive=True)

    @pytest.fixture
    def store(self):
        return open_store(f"memory:/{self.root}")

    def outside_keys(self):
        found = self.files.find(self.root, detail=True)
        return {path.removeprefix(f"{self.root}/"): info["size"] for path, info in found.items()}

    def outside_read(self, key):
        return self.files.cat_file(f"{self.root}/{key}")

    def outside_put(self, name, content):
        self.files.pipe_file(f"{self.root}/{name}", content)

    def leave_unfinished(self, key):
        """Objects appear whole in memory."""
