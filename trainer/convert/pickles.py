"""Reads the pickles of torch files with a closed set of instructions, names and results.

Python's own unpickler can be kept from importing, but not from setting attributes of whatever lies on its stack, nor
from calling what it was given. This one knows the instructions that `torch.save` writes (pickle protocol 2,
https://github.com/python/cpython/blob/3.11/Lib/pickletools.py) and no others; what a pickle names is looked up in a
table of the caller and never imported; and only makers from that table are called, which make inert values.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAX_DEPTH = 32
MAX_ITEMS = 1_000_000
KEY_TYPES = (str, int, bool, float, type(None))  # hashing a tuple that is nested deep enough would crash Python


class Named(NamedTuple):
    """What a pickle refers to by name: `make` stands for calling it, and is None where nothing calls it."""

    name: str
    make: Callable[..., Any] | None


class Buildable:
    """A value whose state a pickle may set: `build` takes what it needs of that."""

    def build(self, state: object) -> None:
        """Nothing, unless a subclass takes something."""


class PickleError(Exception):
    """The pickle is damaged, or is not one that torch writes."""


class UnknownName(Exception):
    """The pickle refers to this class or function, which is not in the table."""


def read_pickle(content: bytes, names: Mapping[str, Named], persistent: Callable[[Any], Any]) -> Any:
    """What `content` holds: dicts, lists, tuples, numbers, strings, and what `names` and `persistent` make.

    Raises:
        UnknownName: it refers to a name that is not in `names`.
        PickleError: it cannot be read.
    """
    try:
        value = _Reader(content, names, persistent).read()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise PickleError(f"{type(error).__name__}: {error}") from error
    _check_nesting(value)
    return value


def _check_nesting(value: object) -> None:
    """Comparing values that are nested without end would never end."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if sum(len(_children(parent)) for parent in level) > MAX_ITEMS:
            break
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise PickleError(f"nested more than {MAX_DEPTH} deep, or more than {MAX_ITEMS:,} items wide")


def _children(value: object) -> list[Any] | tuple[Any, ...]:
    if type(value) is dict:
        return list(value.values())
    return value if type(value) in (list, tuple) else ()  # type: ignore[return-value]


class _Reader:
    """The stack machine that a pickle is a program for."""

    def __init__(self, content: bytes, names: Mapping[str, Named], persistent: Callable[[Any], Any]) -> None:
        self.content = content
        self.position = 0
        self.names = names
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        while (code := self.take(1)) != b".":
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise PickleError(f"instruction {code!r} at byte {self.position - 1}, which torch does not write")
            instruction(self)
        return self.stack.pop()

    def take(self, num_bytes: int) -> bytes:
        taken = self.content[self.position : self.position + num_bytes]
        if len(taken) != num_bytes:
            raise PickleError(f"ends at byte {len(self.content)}")
        self.position += num_bytes
        return taken

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def line(self) -> str:
        stop = self.content.index(b"\n", self.position)
        text = self.content[self.position : stop].decode()
        self.position = stop + 1
        return text

    def push(self, value: object) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def tuple_of(self, length: int) -> None:
        if len(self.stack) < length:
            raise PickleError("takes more from the stack than there is")
        self.stack[-length:] = [tuple(self.stack[-length:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise PickleError(f"appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise PickleError(f"sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in KEY_TYPES:
                raise PickleError(f"has a {type(key).__name__} as a key")
            target[key] = value

    def name(self) -> None:
        module, attribute = self.line(), self.line()
        # Protocol 2 is also Python 2's, and names this module as that did.
        name = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
        if name not in self.names:
            raise UnknownName(name)
        self.stack.append(self.names[name])

    def make(self) -> None:
        arguments, named = self.stack.pop(), self.stack.pop()
        if type(named) is not Named or named.make is None or type(arguments) is not tuple:
            raise PickleError(f"calls {named.name if type(named) is Named else f'a {type(named).__name__}'}")
        self.stack.append(named.make(*arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Buildable):
            target.build(state)
        elif type(target) is not dict:  # attributes of an OrderedDict, such as a state dict's metadata, are left out
            raise PickleError(f"sets the state of a {type(target).__name__}")

    def push_persistent(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


_INT, _BYTE, _SHORT, _UNSIGNED = (struct.Struct(layout) for layout in ("<i", "<B", "<H", "<I"))
_FLOAT = struct.Struct(">d")
_INSTRUCTIONS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda r: _check_protocol(r.number(_BYTE)),  # PROTO
    b"h": lambda r: r.push(r.memo[r.number(_BYTE)]),  # BINGET
    b"j": lambda r: r.push(r.memo[r.number(_UNSIGNED)]),  # LONG_BINGET
    b"q": lambda r: r.put(r.number(_BYTE)),  # BINPUT
    b"r": lambda r: r.put(r.number(_UNSIGNED)),  # LONG_BINPUT
    b"X": lambda r: r.push(r.take(r.number(_UNSIGNED)).decode("utf-8", "surrogatepass")),  # BINUNICODE
    b"J": lambda r: r.push(r.number(_INT)),  # BININT
    b"K": lambda r: r.push(r.number(_BYTE)),  # BININT1
    b"M": lambda r: r.push(r.number(_SHORT)),  # BININT2
    b"\x8a": lambda r: r.push(int.from_bytes(r.take(r.number(_BYTE)), "little", signed=True)),  # LONG1
    b"G": lambda r: r.push(r.number(_FLOAT)),  # BINFLOAT
    b"N": lambda r: r.push(None),  # NONE
    b"\x88": lambda r: r.push(True),  # NEWTRUE
    b"\x89": lambda r: r.push(False),  # NEWFALSE
    b"(": _Reader.mark,  # MARK
    b")": lambda r: r.push(()),  # EMPTY_TUPLE
    b"\x85": lambda r: r.tuple_of(1),  # TUPLE1
    b"\x86": lambda r: r.tuple_of(2),  # TUPLE2
    b"\x87": lambda r: r.tuple_of(3),  # TUPLE3
    b"t": lambda r: r.push(tuple(r.since_mark())),  # TUPLE
    b"]": lambda r: r.push([]),  # EMPTY_LIST
    b"a": lambda r: r.append([r.stack.pop()]),  # APPEND
    b"e": lambda r: r.append(r.since_mark()),  # APPENDS
    b"}": lambda r: r.push({}),  # EMPTY_DICT
    b"s": lambda r: r.set_items([r.stack.pop(), r.stack.pop()][::-1]),  # SETITEM
    b"u": lambda r: r.set_items(r.since_mark()),  # SETITEMS
    b"c": _Reader.name,  # GLOBAL
    b"R": _Reader.make,  # REDUCE
    b"\x81": _Reader.make,  # NEWOBJ
    b"b": _Reader.build,  # BUILD
    b"Q": _Reader.push_persistent,  # BINPERSID
}


def _check_protocol(version: int) -> None:
    if version != 2:
        raise PickleError(f"written in pickle protocol {version}, not in torch's, which is 2")
