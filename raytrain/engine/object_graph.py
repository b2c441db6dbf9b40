"""What is reached from an object, each thing with the path that one would write to it.

Nothing of the user's is called on the way: no property, no `__getattr__`, no iterator is moved.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
import types
from collections import deque
from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from raytrain.errors import is_users

# An annotation list of a million entries is no reason to look for a minute; 20,000 objects take 0.1 s on two cores.
MAX_OBJECTS = 20_000
MAX_ENTRIES = 1_000  # of one list, tuple, dict or array of objects; of a list of data sets, one for each scene, all
MAX_HELD = 200_000  # of all things that are looked at: 1,000 lists of 1,000 numbers are but 1,000 objects
LONG = 64  # entries of what holds data, most likely: looked into last

PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic)
ARRAYS = (np.ndarray, torch.Tensor)
CONTAINERS = (list, tuple, dict, set, frozenset, deque)
METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)


def walk(roots: dict[str, Any], into_code: bool = False, plain: bool = True) -> Iterator[tuple[str, Any]]:
    """(path, object) of all that is reached from `roots`, the near first; each object once, plain values wherever.

    into_code: also what classes hold, and what functions name of their modules, where these are the user's own
    plain: with plain values; without them it takes a fifth of the time
    """
    seen: dict[int, Any] = {}  # which keeps them alive: else the number of one might come again as another's
    near, far = deque(roots.items()), deque[tuple[str, Any]]()
    left = MAX_HELD
    while near or far:
        path, value = (near or far).popleft()
        if not isinstance(value, PLAIN):
            if id(value) in seen or (isinstance(value, CONTAINERS) and not value):  # a module has ten empty ones
                continue
            seen[id(value)] = value
        yield path, value
        if len(seen) >= MAX_OBJECTS:
            return
        held = list(islice(held_by(value, path, into_code), left))
        left -= len(held)
        if not plain:
            held = [pair for pair in held if not isinstance(pair[1], PLAIN)]
        (near if len(held) <= LONG else far).extend(held)


def held_by(value: Any, path: str, into_code: bool) -> Iterator[tuple[str, Any]]:
    """What `value` holds itself."""
    if isinstance(value, (*PLAIN, *ARRAYS, random.Random)):
        if isinstance(value, np.ndarray) and value.dtype == object:
            yield from ((f"{path}[{i}]", entry) for i, entry in enumerate(islice(value.flat, MAX_ENTRIES)))
        return
    if isinstance(value, (type, types.ModuleType)):
        if into_code and isinstance(value, type) and is_own(sys.modules.get(value.__module__)):
            yield from held_by_class(value)
        return
    if isinstance(value, dict):
        entries = islice(dict.items(value), MAX_ENTRIES)
        yield from ((f"{path}[{key_text(key, i)}]", entry) for i, (key, entry) in enumerate(entries))
    elif isinstance(value, (list, tuple, deque)):
        most = MAX_OBJECTS if value and is_dataset(value[0]) else MAX_ENTRIES
        yield from ((f"{path}[{i}]", entry) for i, entry in enumerate(islice(value, most)))
    elif isinstance(value, functools.partial):
        yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, METHODS):
        yield f"{path}.__self__", value.__self__
        if isinstance(value, types.MethodType):
            yield f"{path}.__func__", value.__func__
    elif isinstance(value, types.FunctionType):
        yield from held_by_function(value, path, into_code)
    yield from attributes_of(value, path)
    if into_code and not isinstance(value, types.FunctionType):
        yield name_of(type(value)), type(value)


def is_dataset(value: Any) -> bool:
    """Whether one may ask samples of it: none of what merely holds values, or modules."""
    return hasattr(type(value), "__getitem__") and not isinstance(
        value, (*PLAIN, *ARRAYS, *CONTAINERS, torch.nn.Module)
    )


def key_text(key: Any, position: int) -> str:
    """A key of a dict as it is written, or its position where that tells of an address in memory."""
    text = f"{key!r:.60}"
    return text if " at 0x" not in text else f"#{position}"


def attributes_of(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What is in its __dict__ and __slots__, and the plain values that it has of a class that the user wrote."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        own = {}
    if isinstance(own, dict):
        yield from ((f"{path}.{name}", entry) for name, entry in list(own.items()))
    kind: Any = type(value)
    for slot in slots_of(kind):
        try:
            yield f"{path}.{slot.__name__}", slot.__get__(value)
        except AttributeError:  # never set
            continue
    for name in defaults_of(kind):
        if name not in own:
            yield f"{path}.{name}", getattr(kind, name)


@functools.lru_cache(maxsize=1024)
def defaults_of(kind: type) -> tuple[str, ...]:
    own = [vars(base) for base in kind.__mro__ if is_own(sys.modules.get(base.__module__))]
    names = [name for held in own for name, entry in held.items() if isinstance(entry, PLAIN)]
    return tuple(dict.fromkeys(name for name in names if not name.startswith("__")))


@functools.lru_cache(maxsize=1024)
def slots_of(kind: type) -> tuple[types.MemberDescriptorType, ...]:
    written = [vars(base) for base in kind.__mro__ if "__slots__" in vars(base)]
    return tuple(
        entry for names in written for entry in names.values() if isinstance(entry, types.MemberDescriptorType)
    )


def held_by_class(kind: type) -> Iterator[tuple[str, Any]]:
    """Its attributes and methods, and its bases."""
    for name, entry in list(vars(kind).items()):
        if isinstance(entry, (staticmethod, classmethod)):
            entry = entry.__func__
        elif isinstance(entry, property):
            entry = entry.fget
        if isinstance(entry, types.FunctionType) or not name.startswith("__"):
            yield f"{name_of(kind)}.{name}", entry
    yield from ((name_of(base), base) for base in kind.__bases__)


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def held_by_function(function: types.FunctionType, path: str, into_code: bool) -> Iterator[tuple[str, Any]]:
    """Its defaults and what it closes over; with `into_code`, what it names of its module and of the user's others."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from ((f"{path}.__defaults__[{i}]", entry) for i, entry in enumerate(function.__defaults__ or ()))
    yield from ((f"{path}.{name}", entry) for name, entry in (function.__kwdefaults__ or {}).items())
    if not into_code or not is_own_file(function.__code__.co_filename):
        return
    module, names = function.__module__, names_in(function.__code__)
    for name in names:
        entry = function.__globals__.get(name)
        if isinstance(entry, types.ModuleType):
            if is_own(entry):
                yield from ((f"{entry.__name__}.{n}", vars(entry)[n]) for n in names if n in vars(entry))
        elif name in function.__globals__:
            yield f"{module}.{name}", entry


def names_in(code: types.CodeType) -> tuple[str, ...]:
    """The global and attribute names that code uses, and the functions written in it."""
    inner = [names_in(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for names in inner for name in names)]))


def is_own(module: types.ModuleType | None) -> bool:
    """Whether the user has written it, and not installed it."""
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and is_own_file(file)


@functools.lru_cache(maxsize=1024)
def is_own_file(file: str) -> bool:
    return "site-packages" not in file and is_users(file)


def values_of(roots: dict[str, Any], array_bytes: int | None = None) -> dict[str, Hashable]:
    """Path -> value of all that is reached from `roots`, to compare: equal where nothing has changed.

    Of an array it is a digest, of its first `array_bytes` where that is given. What cannot be seen into counts as its
    type.
    """
    return {path: value_of(value, array_bytes) for path, value in walk(roots)}


def value_of(value: Any, array_bytes: int | None = None) -> Hashable:
    if isinstance(value, PLAIN):
        is_nan = isinstance(value, (float, complex, np.generic)) and value != value  # which equals nothing
        return type(value).__name__, repr(value) if is_nan or isinstance(value, np.void) else value
    if isinstance(value, CONTAINERS):
        return type(value).__name__, len(value)
    try:
        if isinstance(value, torch.Tensor):
            return str(value.dtype), tuple(value.shape), digest(bytes_of(value, array_bytes))
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            head = value.reshape(-1)[: None if array_bytes is None else array_bytes // max(1, value.itemsize)]
            return str(value.dtype), value.shape, digest(head.tobytes())
        if callable(getattr(type(value), "tobytes", None)) and not isinstance(value, np.ndarray):  # an image of PIL
            return type(value).__name__, digest(value.tobytes())
    except (RuntimeError, TypeError, ValueError):  # a sparse or a quantised tensor, one on the meta device
        pass
    return type(value).__name__


def bytes_of(tensor: torch.Tensor, array_bytes: int | None) -> Any:
    flat = tensor.detach().reshape(-1)[: None if array_bytes is None else array_bytes // tensor.element_size()]
    return flat.resolve_conj().resolve_neg().cpu().contiguous().view(torch.uint8).numpy()


def digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def difference(before: dict[str, Hashable], after: dict[str, Hashable]) -> str | None:
    """The first path at which two of `values_of` differ."""
    paths = dict.fromkeys([*before, *after])
    return next((path for path in paths if before.get(path, paths) != after.get(path, paths)), None)
