"""What of the user's modules and classes code names, followed from function to function: found without calling any.

By name alone: of `self.scale` every class counts that has a `scale` and is known by then. What is reached by a computed
name is not seen.
"""

from __future__ import annotations

import dis
import sys
import types
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from raytrain.engine.object_graph import ARRAYS, PLAIN, held_by, is_own_file, names_in
from raytrain.errors import is_users

Name = tuple[str, str]  # a module, and what it is called there: ("scenes", "TABLE"), ("scenes", "Scenes.scale")

MAX_REACHED = 1_000  # objects, from one: a data set's parts are near it, its data is not asked for
FEW = 64  # of one object's or container's: of a thousand data sets in a list, most have the same class
MAX_FUNCTIONS = 1_000
AT_CREATION = ("__init__", "__new__", "__post_init__")
STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]
BY_OTHERS = ("set_epoch", "forward")  # called by raytrain, and by torch's modules


class CodeGraph:
    """What the code that makes samples and batches may read of the user's modules, as it is now.

    named: by its name, whatever a function that was reached names of its module or of another of the user's, and what
           classes that were reached have by such a name
    assigned: globals that this code sets itself
    """

    def __init__(self, package: str) -> None:
        """package: whose modules are the user's even if they are installed."""
        self._package = package
        self._unread: deque[types.FunctionType] = deque()
        self._functions: dict[int, types.FunctionType] = {}
        self._classes: dict[type, bool] = {}  # to whether code makes objects of it, and so calls its __init__
        self._seen: set[type] = set()
        self._names: set[str] = set()
        self.named: dict[Name, Any] = {}
        self.assigned: set[Name] = set()

    def add(self, root: Any) -> None:
        """What `root` holds: functions are read, and methods of classes that something calls without a name."""
        for value in reached(root):
            if isinstance(value, types.FunctionType):
                self._add_function(value)
            kind, is_made = (value, True) if isinstance(value, type) else (type(value), False)
            for base in kind.__mro__ if is_made or kind not in self._seen else ():
                if self._is_users_class(base):
                    self._classes[base] = is_made or self._classes.get(base, False)
            self._seen.add(kind)

    def add_method(self, owner: Any, name: str) -> None:
        """One method of an object, and what that names of it; the object's others only where they are named."""
        self._classes = {base: False for base in type(owner).__mro__ if self._is_users_class(base)} | self._classes
        self._names.add(name)
        self.follow()
        for attribute, value in list(vars(owner).items()):
            if attribute in self._names:
                self.add(value)
        self.follow()

    def follow(self) -> None:
        """Read all code that is named, until no more is found."""
        while True:
            while self._unread:
                self._read(self._unread.popleft())
            found = len(self.named)
            for kind, is_made in list(self._classes.items()):
                self._look_into_class(kind, is_made)
            if not self._unread and len(self.named) == found:
                return

    def _read(self, function: types.FunctionType) -> None:
        names, own = names_in(function.__code__), function.__globals__
        module = str(own.get("__name__"))
        self._names.update(names)
        self.assigned |= {(module, name) for name in assigned_in(function.__code__)}
        for name in names:
            if name in own:
                self._take((module, name), own[name])
            for imported in (own.get(name), sys.modules.get(name), sys.modules.get(f"{own.get('__package__')}.{name}")):
                if isinstance(imported, types.ModuleType):
                    self._read_of_module(imported, names, set())

    def _read_of_module(self, module: types.ModuleType, names: tuple[str, ...], read: set[str]) -> None:
        if module.__name__ in read or not self._is_users(module):
            return
        read.add(module.__name__)
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, types.ModuleType):
                self._read_of_module(value, names, read)
            elif name in vars(module):
                self._take((module.__name__, name), value)

    def _look_into_class(self, kind: type, is_made: bool) -> None:
        for name, value in list(vars(kind).items()):
            is_special = name.startswith("__") and name.endswith("__")
            if name in AT_CREATION:
                is_called = is_made
            else:
                is_called = name in BY_OTHERS or (is_special and isinstance(value, types.FunctionType))
            if is_called or (name in self._names and not is_special):
                self._take((kind.__module__, f"{kind.__qualname__}.{name}"), value)

    def _take(self, name: Name, value: Any) -> None:
        if name in self.named or name[1].startswith("__") or isinstance(value, types.ModuleType):
            return
        self.named[name] = value
        self.add(value)

    def _add_function(self, function: types.FunctionType) -> None:
        is_new = id(function) not in self._functions and len(self._functions) < MAX_FUNCTIONS
        if is_new and self._is_users_file(function.__code__.co_filename, str(function.__globals__.get("__name__"))):
            self._functions[id(function)] = function
            self._unread.append(function)

    def _is_users_class(self, kind: type) -> bool:
        return self._is_users(sys.modules.get(kind.__module__))

    def _is_users(self, module: types.ModuleType | None) -> bool:
        file = getattr(module, "__file__", None)
        return module is not None and isinstance(file, str) and self._is_users_file(file, module.__name__)

    def _is_users_file(self, file: str, module: str) -> bool:
        is_installed = "site-packages" in file
        return is_own_file(file) or (is_installed and module.partition(".")[0] == self._package and is_users(file))


def assigned_in(code: types.CodeType) -> set[str]:
    """The globals that code sets, and the functions written in it."""
    names = {name for const in code.co_consts if isinstance(const, types.CodeType) for name in assigned_in(const)}
    if STORE_GLOBAL in code.co_code[::2]:  # to take it apart takes 100 times as long
        names |= {each.argval for each in dis.get_instructions(code) if each.opcode == STORE_GLOBAL}
    return names


def reached(root: Any) -> Iterator[Any]:
    """`root` and what it holds, the near first: of what is long, the first few."""
    seen: dict[int, Any] = {}
    unseen = deque([root])
    while unseen and len(seen) < MAX_REACHED:
        value = unseen.popleft()
        if isinstance(value, (*PLAIN, *ARRAYS)) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        unseen.extend(each for _, each in islice(held_by(value, "", False), FEW))
        if isinstance(value, (staticmethod, classmethod)):
            unseen.append(value.__func__)
        elif isinstance(value, property):
            unseen.extend(each for each in (value.fget, value.fset) if each is not None)
