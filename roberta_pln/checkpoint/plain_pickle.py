"""Pickles of plain values, read without running anything.

A pickle is a program. This machine knows only the instructions that make plain values, and those by which PyTorch
names its storages and tensors; everything else is refused. What it does and keeps is bounded by the bytes that it
reads: Python's own machine can be made to call what it finds, to take gigabytes for ten bytes, or to crash.
"""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any, BinaryIO, Final

from roberta_pln.checkpoint.stored import CheckpointError

_CONSTANTS: Final = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_INTEGERS: Final = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_BYTES: Final = {pickle.SHORT_BINBYTES: 1, pickle.BINBYTES: 4, pickle.BINBYTES8: 8}
_TEXTS: Final = {
    pickle.SHORT_BINSTRING: 1,  # of Python 2, where names were bytes
    pickle.BINSTRING: 4,
    pickle.SHORT_BINUNICODE: 1,
    pickle.BINUNICODE: 4,
    pickle.BINUNICODE8: 8,
}
_SMALL_TUPLES: Final = {pickle.EMPTY_TUPLE: 0, pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_PUTS: Final = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
_GETS: Final = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}
_LONGEST_NAME: Final = 256


class OrderedDict(dict[Any, Any]):
    """Stands for the class of that name; its attributes are left out."""


class Namespace(dict[Any, Any]):
    """Stands for a class whose attributes are all that it holds, as items."""


class Unpickler:
    """Reads one pickle of a file, from where the file is; a subclass says what names stand for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        self._left = self._work = file.seek(0, os.SEEK_END) - start
        file.seek(start)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def find_class(self, module: str, name: str) -> object:
        """What a name stands for: a function of this library, or a value."""
        raise CheckpointError(f"the pickle asks for {module}.{name}, which is refused")

    def persistent_load(self, pid: object) -> object:
        """What a name of something outside of the pickle stands for."""
        raise CheckpointError("the pickle names something outside of it, which is refused")

    def load(self) -> Any:
        """The value.

        Raises:
            Exception: of any kind where the pickle is damaged, CheckpointError where something is refused.
        """
        while (code := self._take(1)) != pickle.STOP:
            self._step(code)
        return self._stack.pop()

    def _step(self, code: bytes) -> None:
        stack = self._stack
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _INTEGERS:
            form = _INTEGERS[code]
            stack += struct.unpack(form, self._take(struct.calcsize(form)))
        elif code in _TEXTS:
            stack.append(self._take(self._number(_TEXTS[code])).decode())
        elif code in _BYTES:
            stack.append(self._take(self._number(_BYTES[code])))
        elif code in _SMALL_TUPLES:
            stack.append(tuple(self._top(_SMALL_TUPLES[code])))
        elif code in _PUTS:
            self._memo[self._number(_PUTS[code])] = stack[-1]
        elif code in _GETS:
            stack.append(self._memo[self._number(_GETS[code])])
        else:
            self._rarer_step(code)

    def _rarer_step(self, code: bytes) -> None:
        stack = self._stack
        match code:
            case pickle.PROTO:
                self._take(1)
            case pickle.FRAME:
                self._take(8)
            case pickle.LONG1:
                stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True))
            case pickle.MEMOIZE:
                self._memo[len(self._memo)] = stack[-1]
            case pickle.MARK:
                self._marks.append(len(stack))
            case pickle.TUPLE:
                stack.append(tuple(self._marked()))
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.APPEND | pickle.APPENDS:
                items = self._marked() if code == pickle.APPENDS else self._top(1)
                _checked(stack[-1], list).extend(items)
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.SETITEM | pickle.SETITEMS:
                items = self._marked() if code == pickle.SETITEMS else self._top(2)
                _put(_checked(stack[-1], dict), zip(items[::2], items[1::2], strict=True))
            case pickle.GLOBAL:
                stack.append(self.find_class(self._line(), self._line()))
            case pickle.STACK_GLOBAL:
                module, name = self._top(2)
                stack.append(self.find_class(_checked(module, str), _checked(name, str)))
            case pickle.BINPERSID:
                pid = stack.pop()
                self._spend(pid)
                stack.append(self.persistent_load(pid))
            case pickle.REDUCE | pickle.NEWOBJ:
                function, arguments = self._top(2)
                self._spend(_checked(arguments, tuple), *arguments)
                stack.append(self._called(function, arguments))
            case pickle.BUILD:
                state = stack.pop()
                self._spend(state)
                _build(stack[-1], state)
            case _:
                raise CheckpointError(f"the pickle has the instruction {code!r}, which no checkpoint needs")

    def _called(self, function: Any, arguments: tuple[Any, ...]) -> object:
        if function is OrderedDict:
            made = OrderedDict()
            for pairs in arguments:
                _put(made, (_checked(pair, list) for pair in _checked(pairs, list)))
            return made
        return function(*arguments)  # one that `find_class` gave: nothing else can be called

    def _take(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise EOFError("it ends too early")
        return self._file.read(size)

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _line(self) -> str:
        line = self._file.readline(_LONGEST_NAME)
        self._left -= len(line)
        if not line.endswith(b"\n"):
            raise EOFError("a name does not end")
        return line[:-1].decode()

    def _top(self, count: int) -> list[Any]:
        """Take some values off the stack."""
        if count > len(self._stack):
            raise IndexError("there are too few values")
        start = len(self._stack) - count
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _marked(self) -> list[Any]:
        """Take all values off the stack that are above the last mark."""
        return self._top(len(self._stack) - self._marks.pop())

    def _spend(self, *values: object) -> None:
        """Count what is to be gone through; values can be used often, but not more than there are bytes."""
        self._work -= sum(len(value) for value in values if isinstance(value, dict | list | tuple))
        if self._work < 0:
            raise CheckpointError("the pickle makes more of its values than it holds")


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {kind.__name__} is needed, not a {type(value).__name__}")
    return value


def _put(target: dict[Any, Any], items: Any) -> None:
    for key, value in items:
        if not isinstance(key, str | int | float | None):  # others, deeply nested, could crash Python
            raise TypeError(f"a key must be text or a number, not a {type(key).__name__}")
        target[key] = value


def _build(target: object, state: object) -> None:
    """Set attributes, which only a Namespace has."""
    if isinstance(target, Namespace):
        _put(target, _checked(state, dict).items())
    elif not isinstance(target, OrderedDict):
        raise TypeError(f"a {type(target).__name__} has no attributes")
