"""Pickles as inert trees: opcodes are read and written, and nothing is imported, called or built.

``GLOBAL`` becomes a ``Named``, a call becomes a ``Called`` with its arguments, and an object's
state is kept beside it; what such a tree means is for the reader of a format to say, by the names
that it knows. An opcode outside of the list below is refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MAX_PICKLE_BYTES", "Called", "Named", "Persistent", "dump_inert", "load_inert"]

MAX_PICKLE_BYTES = 512 * 1024 * 1024
"""A longer pickle is refused: DCP's index needs some 300 bytes a chunk."""


@dataclass(frozen=True, slots=True)
class Named:
    """What a pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Called:
    """What a pickle would get by a call; ``state`` is what it would then be given."""

    what: object
    args: object
    is_new: bool = False
    """By ``__new__``, as plain objects are made."""
    state: object = None
    items: list[object] = field(default_factory=list)
    """Appended to it."""
    pairs: list[tuple[object, object]] = field(default_factory=list)
    """Set in it."""

    @property
    def name(self) -> str:
        """Dotted name of what would be called; empty where that is no plain name."""
        return str(self.what) if isinstance(self.what, Named) else ""


@dataclass(frozen=True, slots=True, eq=False)
class Persistent:
    """A reference out of the pickle, such as to a storage."""

    value: Any


class _Mark:
    """Where a group of items begins on the stack."""


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"),
    *("BINFLOAT", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING"),
}
_IGNORED = {"PROTO", "FRAME"}


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._operations: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self.stack.append(_Mark),
            "POP": lambda _: self._pop_or_mark(),
            "POP_MARK": lambda _: self._drop(self._to_mark()),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_SET": lambda _: self.stack.append(Called(Named("builtins", "set"), ())),
            "TUPLE": lambda _: self.stack.append(tuple(self._to_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "LIST": lambda _: self.stack.append(self._to_mark()),
            "DICT": lambda _: self.stack.append(dict(_pairs(self._to_mark()))),
            "APPEND": lambda _: self._append([self._pop()]),
            "APPENDS": lambda _: self._append(self._to_mark()),
            "ADDITEMS": lambda _: self._append(self._to_mark()),
            "SETITEM": lambda _: self._set([self._pop(), self._pop()][::-1]),
            "SETITEMS": lambda _: self._set(self._to_mark()),
            "GLOBAL": lambda arg: self.stack.append(Named(*arg.split(" ", 1))),
            "STACK_GLOBAL": lambda _: self._stack_global(),
            "REDUCE": lambda _: self._call(is_new=False),
            "NEWOBJ": lambda _: self._call(is_new=True),
            "BUILD": lambda _: self._build(),
            "BINPERSID": lambda _: self.stack.append(Persistent(self._pop())),
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), self._get),
        }

    def run(self, data: bytes) -> Any:
        for opcode, arg, position in pickletools.genops(data):
            name = opcode.name
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self.stack.append(arg)
            elif name == "STOP":
                break
            elif name in self._operations:
                self._operations[name](arg)
            elif name not in _IGNORED:
                raise ValueError(f"opcode {name} at byte {position} is not allowed")
        return self._pop()

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def _pop_or_mark(self) -> None:
        if self.stack:
            self.stack.pop()

    def _drop(self, _: list[Any]) -> None:
        return

    def _to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is _Mark:
                return items[::-1]
            items.append(item)
        raise ValueError("no mark on the stack")

    def _tuple(self, length: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(length)][::-1]))

    def _append(self, items: list[Any]) -> None:
        into = self.stack[-1] if self.stack else None
        if isinstance(into, Called):
            into.items.extend(items)
        elif isinstance(into, list):
            into.extend(items)
        else:
            raise ValueError("items for no list")

    def _set(self, flat: list[Any]) -> None:
        into = self.stack[-1] if self.stack else None
        if isinstance(into, Called):
            into.pairs.extend(_pairs(flat))
        elif isinstance(into, dict):
            into.update(_pairs(flat))
        else:
            raise ValueError("items for no mapping")

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a name that is no text")
        self.stack.append(Named(module, name))

    def _call(self, *, is_new: bool) -> None:
        args, what = self._pop(), self._pop()
        self.stack.append(Called(what, args, is_new))

    def _build(self) -> None:
        state = self._pop()
        made = self.stack[-1] if self.stack else None
        if not isinstance(made, Called):
            raise ValueError("a state for no object")
        made.state = state

    def _put(self, number: int) -> None:
        if not self.stack:
            raise ValueError("the stack is empty")
        self._memo[number] = self.stack[-1]

    def _get(self, number: int) -> None:
        self.stack.append(self._memo[number])


def _pairs(flat: list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def load_inert(data: bytes) -> Any:
    """Parse one pickle.

    Returns:
        None, bool, int, float, str, bytes, tuple, list and dict as they are; ``Named``, ``Called``
        and ``Persistent`` for all else. An object that occurs twice is one object.

    Raises:
        ValueError: Malformed, too long, or with an opcode that is not allowed.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    try:
        return _Machine().run(data)
    except (LookupError, TypeError, RecursionError, OverflowError, struct.error) as error:
        raise ValueError(f"malformed ({error!r})") from error


def dump_inert(value: object) -> bytes:
    """Write such a tree as a pickle of protocol 2.

    Raises:
        TypeError: It holds something that is no part of such a tree.
    """
    out = bytearray(b"\x80\x02")
    _write(value, out)
    return bytes(out + b".")


def _write(value: Any, out: bytearray) -> None:
    kind = type(value)
    if value is None or kind is bool:
        out += b"N" if value is None else b"\x88" if value else b"\x89"
    elif kind is int:
        length = value.bit_length() // 8 + 1
        if length > 255:
            raise TypeError(f"an integer of {length} bytes")
        out += b"\x8a" + bytes([length]) + value.to_bytes(length, "little", signed=True)
    elif kind is float:
        out += b"G" + struct.pack(">d", value)
    elif kind is str:
        text = value.encode()
        out += b"X" + len(text).to_bytes(4, "little") + text
    elif kind in (tuple, list, dict):
        _write_group(value, out)
    elif kind is Named:
        out += f"c{value.module}\n{value.name}\n".encode()
    elif kind is Persistent:
        _write(value.value, out)
        out += b"Q"
    elif kind is Called:
        _write_called(value, out)
    else:
        raise TypeError(f"{kind.__module__}.{kind.__qualname__} has no inert form")


def _write_group(value: Any, out: bytearray) -> None:
    if isinstance(value, tuple):
        out += b"("
        for item in value:
            _write(item, out)
        out += b"t"
    elif isinstance(value, list):
        out += b"]("
        for item in value:
            _write(item, out)
        out += b"e"
    else:
        out += b"}"
        _write_pairs(value.items(), out)


def _write_pairs(pairs: Iterable[tuple[Any, Any]], out: bytearray) -> None:
    out += b"("
    for key, item in pairs:
        _write(key, out)
        _write(item, out)
    out += b"u"


def _write_called(value: Called, out: bytearray) -> None:
    _write(value.what, out)
    _write(value.args, out)
    out += b"\x81" if value.is_new else b"R"
    if value.pairs:
        _write_pairs(value.pairs, out)
    if value.state is not None:
        _write(value.state, out)
        out += b"b"
