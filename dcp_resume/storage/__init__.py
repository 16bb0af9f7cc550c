"""Where bytes are kept: POSIX file systems, S3, and whatever else fsspec reaches.

Everything above this package sees only the protocol ``ObjectStore`` and gets one from
``open_store``. Importing the package loads no backend; ``open_store`` loads the one it needs.
"""

from dcp_resume.storage.clock import read_clock
from dcp_resume.storage.object_store import ByteRange, Finite, ObjectInfo, ObjectStore, RangeRead
from dcp_resume.storage.opening import open_store
from dcp_resume.storage.probe import check_exclusive_create, race_for_keys
from dcp_resume.storage.retry import RetryPolicy

__all__ = [
    "ByteRange",
    "Finite",
    "ObjectInfo",
    "ObjectStore",
    "RangeRead",
    "RetryPolicy",
    "check_exclusive_create",
    "open_store",
    "race_for_keys",
    "read_clock",
]
