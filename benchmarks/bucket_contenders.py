"""Libraries that keep checkpoints in a bucket, behind the same verbs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from benchmarks.payload import State
from dcp_resume import CheckpointManager, SaveMode, Settings
from tests.support.s3_server import S3Server

__all__ = ["BUCKET", "BUCKET_CONTENDERS", "BucketContender"]

BUCKET = "benchmark"
"""As ``benchmarks.s3`` calls it."""


class BucketContender(Protocol):
    """One library, over one bucket."""

    def save(self, state: State) -> None:
        """Save."""

    def load(self, state: State) -> None:
        """Load what was saved last into the state's own tensors."""

    def close(self) -> None:
        """Give up threads and buffers."""


class OursInBucket:
    """dcp_resume's manager, as it comes."""

    def __init__(self, server: S3Server) -> None:
        settings = Settings(mode=SaveMode.BLOCKING, storage_options=server.storage_options)
        self._manager = CheckpointManager(f"s3://{BUCKET}/manager", settings)
        self._step = 0

    def save(self, state: State) -> None:
        """Save durably."""
        self._step += 1
        self._manager.save(self._step, state)

    def load(self, state: State) -> None:
        """Load, with every block verified."""
        self._manager.load(state)

    def close(self) -> None:
        """Close the manager."""
        self._manager.close()


class DcpFsspec:
    """torch.distributed.checkpoint through s3fs."""

    def __init__(self, server: S3Server) -> None:
        self._options = server.storage_options

    def save(self, state: State) -> None:
        """Save over the last one."""
        dcp.save(state, storage_writer=FsspecWriter(f"s3://{BUCKET}/dcp", **self._options))

    def load(self, state: State) -> None:
        """Load in place."""
        dcp.load(state, storage_reader=FsspecReader(f"s3://{BUCKET}/dcp", **self._options))

    def close(self) -> None:
        """Nothing is kept."""


class DcpConnector:
    """torch.distributed.checkpoint through s3torchconnector."""

    def __init__(self, server: S3Server) -> None:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        os.environ.update(server.env)
        config = S3ClientConfig(force_path_style=True)
        # Its writer and reader take no endpoint.
        self._client = S3Client("us-east-1", endpoint=server.endpoint, s3client_config=config)
        self._url = f"s3://{BUCKET}/connector"

    def save(self, state: State) -> None:
        """Save over the last one."""
        from s3torchconnector.dcp import S3StorageWriter

        dcp.save(state, storage_writer=self._reach(S3StorageWriter("us-east-1", self._url)))

    def load(self, state: State) -> None:
        """Load in place."""
        from s3torchconnector.dcp import S3StorageReader

        dcp.load(state, storage_reader=self._reach(S3StorageReader("us-east-1", self._url)))

    def close(self) -> None:
        """Nothing is kept."""

    def _reach(self, door: Any) -> Any:
        door.fs._client = self._client
        return door


BUCKET_CONTENDERS: Mapping[str, Callable[[S3Server], BucketContender]] = {
    "dcp_resume": OursInBucket,
    "dcp + s3fs": DcpFsspec,
    "dcp + s3torchconnector": DcpConnector,
}
