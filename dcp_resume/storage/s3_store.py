"""A bucket, or a prefix in one, as a store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dcp_resume.errors import ConfigurationError, StorageError
from dcp_resume.events import Choice
from dcp_resume.storage.fsspec_bridge import PerProcess
from dcp_resume.storage.keys import check_key, check_prefix, is_key
from dcp_resume.storage.object_store import ObjectInfo, RangeRead
from dcp_resume.storage.os_errors import short_read
from dcp_resume.storage.part_policy import BUDGET_BYTES, plan_parts
from dcp_resume.storage.retry import Operation, RetryPolicy, TransientFault
from dcp_resume.storage.s3_client import S3Client
from dcp_resume.storage.s3_errors import Refusal, refusal_in, refused
from dcp_resume.storage.s3_read import drain, read_ranges
from dcp_resume.storage.s3_upload import Uplink, crc32_header, upload

__all__ = ["S3Store"]

_DELETE_BATCH = 1000
_UPLOAD_ID = "#"
"""Between key and upload id in the names of open uploads; no key contains it."""


class S3Store:
    """Objects of one bucket whose keys begin with ``prefix``.

    Args:
        bucket: Name of the bucket; it must exist.
        prefix: Key under which everything lies; empty for the whole bucket.
        storage_options: Options of s3fs; by default the usual AWS variables, profiles and roles.
        retry: Policy for each single request.
    """

    def __init__(
        self, bucket: str, prefix: str, *, storage_options: Mapping[str, Any], retry: RetryPolicy
    ) -> None:
        self._root = f"{prefix}/" if prefix else ""
        self._url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = S3Client(bucket, self._url, storage_options, retry)
        self._uplinks = PerProcess(Uplink)

    @property
    def url(self) -> str:
        """The root as ``s3://`` URL."""
        return self._url

    @property
    def read_bytes(self) -> int:
        """A request takes tens of milliseconds to its first byte, and 2 ms of CPU in botocore."""
        return 16 * 2**20

    @property
    def choices(self) -> tuple[Choice, ...]:
        """See ``Tuned.choices``: of an upload of a GiB that began now."""
        plan = plan_parts(1 << 30, rate=self._uplinks.get().rate.bytes_per_s)
        return (
            Choice("upload_part", plan.part_bytes, "bytes", "a quarter of a second, by the rate"),
            Choice("uploads_in_flight", plan.width, "", "what the budget of bytes holds"),
            Choice("upload_budget", BUDGET_BYTES, "bytes", "memory of parts, over all files"),
        )

    def create(self, key: str, data: bytes) -> None:
        """See ``ObjectStore.create``.

        Always one PUT: of several conditional multipart uploads, more than one may win on some
        servers.

        Raises:
            KeyExists: The key is taken, possibly by an earlier try of this call.
            OutcomeUnknown: No answer came before the deadline.
        """
        full = self._root + check_key(key)
        self._client.run(
            self._client.request(
                self._client.operation("create", key, exclusive=True),
                "put_object",
                Key=full,
                Body=bytes(data),
                IfNoneMatch="*",
                ChecksumCRC32=crc32_header(data),
            )
        )

    def write(self, key: str, buffers: Iterable[memoryview], *, size: int | None = None) -> int:
        """See ``ObjectStore.write``; big objects go in parts, a bounded number at a time.

        Raises:
            ValueError: Another number of bytes than ``size``.
        """
        full = self._root + check_key(key)
        operation = self._client.operation("write", key)
        return self._client.run(
            upload(self._client, self._uplinks.get(), operation, full, buffers, size)
        )

    def read(self, key: str, *, max_bytes: int) -> bytes:
        """See ``ObjectStore.read``."""
        full = self._root + check_key(key)
        operation = self._client.operation("read", key)

        async def attempt() -> bytes:
            answer = await self._client.send("get_object", Key=full)
            size = answer["ContentLength"]
            async with answer["Body"]:
                if size > max_bytes:
                    raise short_read(
                        url=self._url,
                        key=key,
                        expected_bytes=max_bytes,
                        found_bytes=size,
                        where="it is larger than any object of its kind",
                    )
                content = bytearray(size)
                await drain(answer["Body"], [memoryview(content)])
            return bytes(content)

        return self._client.run(self._client.retrying(operation, attempt))

    def read_into(self, key: str, reads: Sequence[RangeRead]) -> None:
        """See ``ObjectStore.read_into``; ranges that touch share a request."""
        full = self._root + check_key(key)
        operation = self._client.operation("read", key)
        self._client.run(read_ranges(self._client, operation, full, reads))

    def size(self, key: str) -> int:
        """See ``ObjectStore.size``."""
        full = self._root + check_key(key)
        operation = self._client.operation("look up", key)
        answer = self._client.run(self._client.request(operation, "head_object", Key=full))
        return int(answer["ContentLength"])

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """See ``ObjectStore.list``."""
        self._client.check_open()
        check_prefix(prefix)
        check_prefix(start_after, option="start_after")
        return self._objects(prefix, start_after)

    def delete(self, keys: Iterable[str]) -> None:
        """See ``ObjectStore.delete``; a thousand keys a request."""
        checked = [check_key(key) for key in keys]
        self._client.check_open()
        first: StorageError | None = None
        for start in range(0, len(checked), _DELETE_BATCH):
            batch = checked[start : start + _DELETE_BATCH]
            try:
                self._delete_batch(batch)
            except StorageError as error:
                first = first or error
        if first is not None:
            raise first

    def prepare(self, prefix: str) -> None:
        """See ``ObjectStore.prepare``: nothing to do."""
        self._client.check_open()
        check_prefix(prefix)

    def unfinished(self, prefix: str) -> Iterator[ObjectInfo]:
        """See ``ObjectStore.unfinished``: open multipart uploads; their size is not told (0)."""
        self._client.check_open()
        check_prefix(prefix)
        return self._open_uploads(prefix)

    def discard(self, unfinished: Iterable[ObjectInfo]) -> None:
        """See ``ObjectStore.discard``: abort exactly these uploads.

        Raises:
            ConfigurationError: An entry did not come from ``unfinished``.
        """
        first: StorageError | None = None
        for info in list(unfinished):
            key, separator, upload_id = info.key.partition(_UPLOAD_ID)
            if not (separator and is_key(key)):
                raise ConfigurationError(
                    f"cannot discard {info.key!r} at {self._url}: it is no open upload. Pass on"
                    " what `unfinished` yields, unchanged",
                    option="unfinished",
                )
            try:
                self._abort(key, upload_id)
            except StorageError as error:
                first = first or error
        if first is not None:
            raise first

    def close(self) -> None:
        """See ``ObjectStore.close``."""
        self._client.close()

    def _objects(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        operation = self._client.operation("list", prefix)
        skip = _safe_start(prefix, start_after)
        position = {"StartAfter": self._root + skip} if skip else {}
        found: list[ObjectInfo] = []
        while True:
            page = self._client.run(
                self._client.request(
                    operation, "list_objects_v2", Prefix=self._root + prefix, **position
                )
            )
            for entry in page.get("Contents", ()):
                key = self._key(entry["Key"])
                if is_key(key) and key > start_after:  # some servers list directories as objects
                    modified_s = entry["LastModified"].timestamp()
                    found.append(ObjectInfo(key=key, size=entry["Size"], modified_s=modified_s))
            if not page.get("IsTruncated"):
                break
            position = {"ContinuationToken": page["NextContinuationToken"]}
        # AWS sorts by whole keys, but SeaweedFS by directories ("a/x" before "a-b").
        yield from sorted(found, key=lambda info: info.key)

    def _delete_batch(self, keys: Sequence[str]) -> None:
        operation = self._client.operation("delete", keys[0])
        objects = [{"Key": self._root + key} for key in keys]

        async def attempt() -> None:
            answer = await self._client.send(
                "delete_objects", Delete={"Objects": objects, "Quiet": True}
            )
            errors = [
                _error_of_one(self._client.operation("delete", self._key(entry["Key"])), entry)
                for entry in answer.get("Errors", ())
                if entry.get("Code") != "NoSuchKey"
            ]
            # A refusal first: repeating the batch would not cure it.
            for error in sorted(errors, key=lambda error: isinstance(error, TransientFault)):
                raise error

        self._client.run(self._client.retrying(operation, attempt))

    def _open_uploads(self, prefix: str) -> Iterator[ObjectInfo]:
        operation = self._client.operation("list uploads under", prefix)
        position: dict[str, str] = {}
        while True:
            page = self._client.run(
                self._client.request(
                    operation, "list_multipart_uploads", Prefix=self._root + prefix, **position
                )
            )
            for entry in page.get("Uploads", ()):
                key = self._key(entry["Key"])
                if is_key(key):
                    yield ObjectInfo(
                        key=f"{key}{_UPLOAD_ID}{entry['UploadId']}",
                        size=0,
                        modified_s=entry["Initiated"].timestamp(),
                    )
            if not page.get("IsTruncated"):
                return
            position = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _abort(self, key: str, upload_id: str) -> None:
        operation = self._client.operation("abort an upload of", key)
        try:
            self._client.run(
                self._client.request(
                    operation, "abort_multipart_upload", Key=self._root + key, UploadId=upload_id
                )
            )
        except StorageError as error:
            refusal = refusal_in(error)
            if refusal is None or refusal.code != "NoSuchUpload":
                raise

    def _key(self, full: str) -> str:
        return full.removeprefix(self._root)


def _error_of_one(operation: Operation, entry: Mapping[str, Any]) -> Exception:
    """Error for one key of a batch, which the server answers with status 200 as a whole."""
    code = str(entry.get("Code", ""))
    return refused(Refusal(code, 0, str(entry.get("Message", ""))), operation)


def _safe_start(prefix: str, start_after: str) -> str:
    """Where a server may begin to list, so that it skips no key above ``start_after``.

    Servers that sort by directories (SeaweedFS) take "a/x" for smaller than "a-b" or "a.b", and
    skip the directory "a" if told to start after "a". Cut before the first ``-``, ``.`` or ``/``
    and one more character, a name is a safe start in either order: "log/000000000123.json" becomes
    "log/00000000012". Empty where there is nothing to gain.
    """
    directory = prefix[: prefix.rfind("/") + 1]
    if not start_after.startswith(directory):
        return ""
    stem = re.split("[-./]", start_after.removeprefix(directory), maxsplit=1)[0][:-1]
    return directory + stem if stem else ""
