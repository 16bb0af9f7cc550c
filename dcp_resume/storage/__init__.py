"""Where bytes are kept: POSIX file systems, S3, and whatever else fsspec reaches.

Everything above this package sees only the protocol ``ObjectStore`` and gets one from
``open_store``. Importing the package loads no backend; ``open_store`` loads the one it needs.
"""

from dcp_resume.storage.clock import read_clock
from dcp_resume.storage.cpu_time import moving_cpu_s
from dcp_resume.storage.object_store import (
    ByteRange,
    Finite,
    ObjectInfo,
    ObjectStore,
    RangeRead,
    Tuned,
)
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
    "Tuned",
    "check_exclusive_create",
    "moving_cpu_s",
    "open_store",
    "race_for_keys",
    "read_clock",
]
