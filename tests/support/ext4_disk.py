"""A small ext4 on a loop device, whose power can be cut; needs root and a kernel with ext4.

with in_memory(tmp_path) as directory, Ext4Disk.new(directory) as disk:
    ...  # write below disk.root
    disk.cut_power(Cut.NOW)  # all further input and output fails
    disk.restart()           # what a machine sees once the power is back
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import secrets
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CannotMount", "Cut", "Ext4Disk", "in_memory"]

_EXT4_IOC_SHUTDOWN = 0x8004587D
_MIB = 1 << 20


class CannotMount(Exception):
    """This machine or user can have no such disk; says why."""


class Cut(enum.Enum):
    """What the disk had written when the power went."""

    NOW = 2
    """What was synced."""
    AFTER_JOURNAL = 1
    """The journal too, as every few seconds: all names, but not the bytes of files not synced."""


@contextlib.contextmanager
def in_memory(directory: Path, *, num_mib: int = 64) -> Iterator[Path]:
    """An empty directory for images: their syncs wait for no real disk.

    Raises:
        CannotMount: A program or a right is missing.
    """
    root = directory / "memory"
    root.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={num_mib}m", "tmpfs", str(root))
    try:
        yield root
    finally:
        # Lazily: a loop device may let go of its image a little later.
        subprocess.run(["umount", "-l", str(root)], check=True)


class Ext4Disk:
    """A mounted image.

    Args:
        image: File with an ext4.
        root: Empty directory, where it is mounted.
    """

    def __init__(self, image: Path, root: Path) -> None:
        self.image = image
        self.root = root
        root.mkdir(exist_ok=True)
        self._mount()

    @classmethod
    def new(cls, directory: Path, *, num_mib: int = 16) -> Ext4Disk:
        """Make and mount an empty one below a directory.

        Raises:
            CannotMount: A program or a right is missing.
        """
        image = directory / "ext4.img"
        with image.open("wb") as file:
            file.truncate(num_mib * _MIB)
        _run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))
        return cls(image, directory / "disk")

    @contextlib.contextmanager
    def copied(self, directory: Path) -> Iterator[Ext4Disk]:
        """Another disk with the same content, in a new directory; this one must not be mounted."""
        directory.mkdir()
        image = directory / "ext4.img"
        _copy(self.image, image)
        with type(self)(image, directory / "disk") as disk:
            yield disk
        shutil.rmtree(directory)

    def cut_power(self, cut: Cut) -> None:
        """Stop the file system; from now on all its system calls fail with EIO."""
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", cut.value))
        finally:
            os.close(descriptor)

    def restart(self) -> None:
        """Mount what the disk holds, as a machine does when it starts: the journal is replayed.

        The image is copied: a mount namespace of someone else may keep the old file system alive.
        """
        old = self.image
        self.image = old.with_name(f"{secrets.token_hex(4)}.img")
        _copy(old, self.image)
        self.unmount()
        old.unlink()
        self._mount()

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Whoever writes hangs, and cannot even be killed, until the end of the context.

        It ends after a minute at most, and with this process: nothing else would end the hang.
        """
        thaw = ["sh", "-c", 'timeout 60 cat; fsfreeze --unfreeze "$0"', str(self.root)]
        with subprocess.Popen(thaw, stdin=subprocess.PIPE) as thawer:
            _run("fsfreeze", "--freeze", str(self.root))
            yield
        if thawer.returncode:
            raise CannotMount(f"{self.root} hung for more than a minute")

    def unmount(self) -> None:
        """Unmount; nobody may have a file open on it."""
        subprocess.run(["umount", str(self.root)], check=True)

    def _mount(self) -> None:
        # Without `commit` the journal is written every 5 s, and a cut would lose less.
        _run("mount", "-o", "loop,commit=300", str(self.image), str(self.root))

    def __enter__(self) -> Ext4Disk:
        return self

    def __exit__(self, *error: object) -> None:
        if self.root.is_mount():
            self.unmount()


def _copy(image: Path, to: Path) -> None:
    subprocess.run(["cp", "--sparse=always", str(image), str(to)], check=True)


def _run(program: str, *arguments: str) -> None:
    if shutil.which(program) is None:
        raise CannotMount(f"{program} is not installed")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMount(f"{program} failed: {done.stderr.strip()}")
