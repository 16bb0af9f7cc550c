"""The zip archives of ``torch.save``: found inside a file's bytes, and laid out to stream."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcp_resume.interop.outgoing import Checksum, Segment
from dcp_resume.session.windows import StoredBox

__all__ = ["Entry", "lay_out_archive", "read_entries"]

MAX_DIRECTORY_BYTES = 256 * 1024 * 1024
ALIGNMENT = 64

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAX32 = 0xFFFFFFFF

ReadRange = Callable[[int, int], bytes]
"""Bytes from start to stop, counted from the archive's first."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of an archive, uncompressed."""

    name: str
    header: int
    """Byte of its local header."""
    size: int

    def begin(self, read: ReadRange) -> int:
        """Byte of its data.

        Raises:
            ValueError: There is no local header.
        """
        fields = _LOCAL.unpack(read(self.header, self.header + _LOCAL.size))
        if fields[0] != b"PK\3\4":
            raise ValueError(f"no local header of {self.name}")
        return int(self.header + _LOCAL.size + fields[9] + fields[10])


def read_entries(read: ReadRange, length: int) -> dict[str, Entry]:
    """The members of an archive by name, without the directory that they are all in.

    Args:
        read: Reads its bytes.
        length: Of the archive.

    Raises:
        ValueError: No archive, a compressed or encrypted member, or more than the caps allow.
    """
    tail_at = max(0, length - _END.size - _LOCATOR.size - _END64.size)
    tail = read(tail_at, length)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise ValueError("no zip archive, or one that is cut short")
    _, _, _, _, count, size, begin, _ = _END.unpack(tail[-_END.size :])
    locator_at = len(tail) - _END.size - _LOCATOR.size
    if locator_at >= 0 and tail[locator_at : locator_at + 4] == b"PK\6\7":
        _, _, at, _ = _LOCATOR.unpack(tail[locator_at : locator_at + _LOCATOR.size])
        if not 0 <= at <= length - _END64.size:
            raise ValueError("the end of its directory lies outside of it")
        fields = _END64.unpack(read(at, at + _END64.size))
        count, size, begin = fields[7], fields[8], fields[9]
    if size > MAX_DIRECTORY_BYTES or begin + size > length:
        raise ValueError(f"a directory of {size} bytes at {begin}, in {length}")
    return _parse_directory(read(begin, begin + size), count, length)


def _parse_directory(data: bytes, count: int, length: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data):
            raise ValueError("its directory is cut short")
        fields = _CENTRAL.unpack_from(data, at)
        flags, method, packed, size = fields[3], fields[4], fields[8], fields[9]
        lengths, header = fields[10:13], fields[16]
        at += _CENTRAL.size
        name = data[at : at + lengths[0]].decode()
        extra = data[at + lengths[0] : at + lengths[0] + lengths[1]]
        packed, size, header = _widened(extra, packed, size, header)
        at += sum(lengths)
        if method or flags & 1 or packed != size:
            raise ValueError(f"{name} is compressed or encrypted")
        if header + size > length:
            raise ValueError(f"{name} reaches past the end")
        short = name.partition("/")[2] or name
        if short in entries:
            raise ValueError(f"{name} occurs twice")
        entries[short] = Entry(short, header, size)
    return entries


def _widened(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """Sizes of 32 bits, or what the zip64 field says in their place."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [
                w[0] for w in struct.iter_unpack("<Q", extra[at + 4 : at + 4 + length // 8 * 8])
            ]
            size = wide.pop(0) if size == _MAX32 and wide else size
            packed = wide.pop(0) if packed == _MAX32 and wide else packed
            header = wide.pop(0) if header == _MAX32 and wide else header
        at += 4 + length
    return packed, size, header


def lay_out_archive(members: Sequence[tuple[str, bytes | StoredBox]]) -> list[Segment]:
    """The segments of an archive, in the order in which they are written.

    Sizes stand in front of each member and checksums behind it, so that it streams; data begins at
    multiples of 64, as in those of torch.

    Args:
        members: Name and content, in order.
    """
    segments: list[Segment] = []
    central: list[Segment] = []
    at = central_bytes = 0
    for name, content in members:
        encoded = name.encode()
        is_held = isinstance(content, bytes)
        size = len(content) if isinstance(content, bytes) else content.box.volume * content.itemsize
        padding = -(at + _LOCAL.size + len(encoded) + 4) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        crc = zlib.crc32(content) if isinstance(content, bytes) else 0
        # Behind data that streams by comes a descriptor; it has 64-bit sizes where 32 do not do.
        wide = size >= _MAX32
        local_size = 0 if not is_held else size
        local = _LOCAL.pack(
            b"PK\3\4", 45, 0 if is_held else 8, 0, 0, 0, crc, local_size, local_size,
            len(encoded), len(extra),
        )  # fmt: skip
        segments.append(local + encoded + extra)
        number = len(segments)
        segments.append(content)
        tail = b""
        checksum: Segment = crc.to_bytes(4, "little")
        if not is_held:
            tail = struct.pack("<QQ" if wide else "<II", size, size)
            checksum = Checksum(number)
            segments += [b"PK\7\x08", checksum, tail]
        field = struct.pack("<HHQQQ", 1, 24, size, size, at)
        head = struct.pack("<4sHHHHHH", b"PK\1\2", 45, 45, 0 if is_held else 8, 0, 0, 0)
        rest = struct.pack(
            "<IIHHHHHII", _MAX32, _MAX32, len(encoded), len(field), 0, 0, 0, 0, _MAX32
        )
        central += [head, checksum, rest + encoded + field]
        central_bytes += len(head) + 4 + len(rest) + len(encoded) + len(field)
        at += len(local) + len(encoded) + len(extra) + size + (0 if is_held else 8 + len(tail))
    end64 = _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, len(members), len(members), central_bytes, at)
    locator = _LOCATOR.pack(b"PK\6\7", 0, at + central_bytes, 1)
    count = min(len(members), 0xFFFF)
    end = _END.pack(b"PK\5\6", 0, 0, count, count, min(central_bytes, _MAX32), min(at, _MAX32), 0)
    return [*segments, *central, end64 + locator + end]
