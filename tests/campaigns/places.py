"""Where the runs of a campaign lie: fresh directories, or prefixes of an S3 server's bucket."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.s3_server import S3Server

__all__ = ["Place", "Places"]

_BUCKET = "campaign"


@dataclass(frozen=True)
class Place:
    """Where one run lies."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    server: S3Server | None = None
    """The server to kill."""


class Places:
    """Fresh roots for runs.

    Args:
        stack: What ends the server, and removes what was written.
        storage: ``local`` or ``s3``.
    """

    def __init__(self, stack: contextlib.ExitStack, storage: str) -> None:
        self._count = 0
        self._server: S3Server | None = None
        self._root = Path(tempfile.mkdtemp(prefix="campaign-runs-"))
        stack.callback(shutil.rmtree, self._root, ignore_errors=True)
        if storage == "s3":
            self._server = stack.enter_context(S3Server())
            self._server.make_bucket(_BUCKET)

    def new(self) -> Place:
        self._count += 1
        if self._server is None:
            return Place(str(self._root / str(self._count)))
        url = f"s3://{_BUCKET}/{self._count}"
        return Place(url, self._server.storage_options, self._server)

    def forget(self, place: Place) -> None:
        if place.server is None:
            shutil.rmtree(place.url, ignore_errors=True)
