"""What a pickle describes, seen without importing, calling or making anything that it names.

The pickle of a checkpoint.pth says which tensors there are and where they lie. Nothing here but plain values, lists,
tuples and dicts is ever made of it: what it would have called is a `Made`.
"""

from __future__ import annotations

import pickletools
from typing import Any, NamedTuple

from raytrain.errors import CheckpointError

VALUES = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
DICTS = ("collections.OrderedDict", "collections.defaultdict")


class Named(NamedTuple):
    """A class or a function, by its dotted path."""

    path: str


class Persistent(NamedTuple):
    """What is kept beside the pickle, by what is said of it there."""

    description: Any


class Made:
    """What calling `of` with the arguments would give; what would be put into it follows them."""

    def __init__(self, of: Any, arguments: tuple[Any, ...]) -> None:
        self.of, self.arguments = of, list(arguments)


def described(pickled: bytes) -> Any:
    """What the pickle describes; a CheckpointError if it is none, or uses what no checkpoint needs."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            machine.do(opcode.name, argument)
        (whole,) = machine.stack
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"its pickle cannot be read: {error}") from error
    return whole


class _Machine:
    """The stack that a pickle's opcodes work on; see module pickletools for each of them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in VALUES:
            self._push(argument)
        elif name in CONSTANTS:
            self._push(CONSTANTS[name])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._work(name, argument)

    def _work(self, name: str, argument: Any) -> None:
        match name:
            case "MARK":
                self._below.append(self.stack)
                self.stack = []
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                self._push(self._memo[argument])
            case "POP" | "POP_MARK" | "BUILD":  # attributes that a state puts on an object are no part of it here
                self._above_mark() if name == "POP_MARK" else self.stack.pop()
            case _:
                self._make(name, argument)

    def _make(self, name: str, argument: Any) -> None:
        match name:
            case "EMPTY_DICT" | "DICT":
                self._push(_pairs(self._above_mark()) if name == "DICT" else {})
            case "EMPTY_LIST" | "EMPTY_SET" | "LIST" | "FROZENSET":
                self._push([] if name.startswith("EMPTY") else self._above_mark())
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._popped(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(name))))
            case "TUPLE":
                self._push(tuple(self._above_mark()))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                self._put(self._popped(1) if name == "APPEND" else self._above_mark())
            case "SETITEM" | "SETITEMS":
                self._put(_pairs(self._popped(2) if name == "SETITEM" else self._above_mark()))
            case "GLOBAL":
                self._push(Named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                self._push(Named(".".join(self._popped(2))))
            case "BINPERSID":
                self._push(Persistent(self.stack.pop()))
            case "REDUCE" | "NEWOBJ":
                of, arguments = self._popped(2)
                is_dict = isinstance(of, Named) and of.path in DICTS
                self._push({} if is_dict else Made(of, arguments))
            case _:
                raise ValueError(f"{name} is in no checkpoint")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _popped(self, count: int) -> list[Any]:
        """The newest on the stack, in the order in which they came there."""
        if count > len(self.stack):
            raise ValueError("it takes more than it has put there")
        parts = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return parts

    def _above_mark(self) -> list[Any]:
        parts, self.stack = self.stack, self._below.pop()
        return parts

    def _put(self, parts: Any) -> None:
        """Into what is on top of the stack: a dict, a list, or what is not made here."""
        into = self.stack[-1]
        if isinstance(into, dict):
            into.update(parts)
        elif isinstance(into, Made):
            into.arguments += parts.items() if isinstance(parts, dict) else parts
        else:
            into += parts


def _pairs(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))
