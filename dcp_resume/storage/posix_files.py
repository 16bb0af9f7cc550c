"""System calls in loops: whole buffers, whole ranges, checked durability."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

__all__ = [
    "first_link",
    "fsync_directory",
    "make_directories",
    "publish_exclusively",
    "read_range",
    "walk_files",
    "write_buffers",
]

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_DIRECTORY_FSYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def write_buffers(descriptor: int, buffers: Iterable[memoryview]) -> int:
    """Append the concatenation of ``buffers`` to a file, without joining them.

    Buffers of anything but a sequence are written one by one, each before the next is asked for.

    Returns:
        Bytes written.

    Raises:
        OSError: As ``writev`` says.
    """
    if isinstance(buffers, Sequence):
        return _write_together(descriptor, buffers)
    return sum(_write_together(descriptor, [buffer]) for buffer in buffers)


def _write_together(descriptor: int, buffers: Sequence[memoryview]) -> int:
    pending = [buffer for buffer in reversed(buffers) if len(buffer)]
    total = 0
    while pending:
        batch = pending[: -_IOV_MAX - 1 : -1]
        written = os.writev(descriptor, batch)
        total += written
        while pending and written >= len(pending[-1]):
            written -= len(pending.pop())
        if written:  # short write: the kernel took only a part of this buffer
            pending[-1] = pending[-1][written:]
    return total


def read_range(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill ``into`` from ``offset`` on.

    Returns:
        Bytes read: fewer than its length only where the file ends.

    Raises:
        OSError: As ``preadv`` says.
    """
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def fsync_directory(path: str) -> None:
    """Make names created in a directory durable.

    Raises:
        OSError: It could not be opened or synced. File systems that have no such operation
            (some FUSE and SMB mounts) say so, and that is accepted: there is nothing to do.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_FSYNC:
            raise
    finally:
        os.close(descriptor)


def first_link(root: str, directory: str) -> str | None:
    """The first part of a directory's path below ``root`` that is a symbolic link.

    Raises:
        OSError: As ``lstat`` says, other than that a part is missing.
    """
    path = root
    for name in directory.split("/") if directory else ():
        path = os.path.join(path, name)
        try:
            if stat.S_ISLNK(os.lstat(path).st_mode):
                return path[len(root) + 1 :]
        except (FileNotFoundError, NotADirectoryError):
            return None
    return None


def make_directories(path: str) -> None:
    """Create a directory and its missing parents, each made durable in its own parent.

    Raises:
        OSError: As ``mkdir`` says, also where another process removes parents meanwhile.
    """
    missing = []
    current = path
    while not os.path.isdir(current):
        missing.append(current)
        parent = os.path.dirname(current)
        if parent == current:
            break
        current = parent
    for directory in reversed(missing):
        try:
            os.mkdir(directory)
        except FileExistsError:
            if not os.path.isdir(directory):
                raise
        fsync_directory(os.path.dirname(directory))


def publish_exclusively(temp: str, final: str, descriptor: int) -> None:
    """Give a finished temporary file its name if, and only if, the name is free.

    Afterwards ``temp`` may or may not still exist.

    Raises:
        FileExistsError: The name is taken.
        NotImplementedError: The file system has neither hard links nor exclusive renames.
        OSError: Anything else.
    """
    try:
        os.link(temp, final, follow_symlinks=False)
    except FileExistsError:
        # An NFS client that repeats a LINK whose answer was lost is told EEXIST by its own success.
        if os.fstat(descriptor).st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_exclusively(temp, final)


def _rename_exclusively(temp: str, final: str) -> None:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise NotImplementedError("this C library has no renameat2") from error
    arguments = (_AT_FDCWD, os.fsencode(temp), _AT_FDCWD, os.fsencode(final), _RENAME_NOREPLACE)
    if renameat2(*arguments) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise NotImplementedError("no hard links and no RENAME_NOREPLACE")
    raise OSError(code, os.strerror(code), final)


def walk_files(
    root: str, prefix: str, start_after: str = ""
) -> Iterator[tuple[str, os.stat_result]]:
    """Walk regular files whose path below ``root`` begins with ``prefix``, as a flat keyspace.

    Paths come in ascending order of the whole string, and only those greater than
    ``start_after``. Files and directories that disappear meanwhile are passed over; symbolic
    links are not followed, so nothing outside the root is ever listed.

    Raises:
        OSError: A directory cannot be read.
    """
    yield from _walk(root, prefix[: prefix.rfind("/") + 1], prefix, start_after)


def _walk(
    root: str, directory: str, prefix: str, start_after: str
) -> Iterator[tuple[str, os.stat_result]]:
    try:
        with os.scandir(os.path.join(root, directory)) as entries:
            # With a slash behind directories, sorting one level sorts the whole keyspace:
            # "a-b" < "a/…" although "a" < "a-b".
            listed = {
                entry.name + "/" * entry.is_dir(follow_symlinks=False): entry for entry in entries
            }
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, entry in sorted(listed.items(), key=itemgetter(0)):
        path = directory + name
        if name.endswith("/"):
            below = path.startswith(prefix) or prefix.startswith(path)
            if below and (path > start_after or start_after.startswith(path)):
                yield from _walk(root, path, prefix, start_after)
        elif path.startswith(prefix) and path > start_after:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode):
                yield path, status
