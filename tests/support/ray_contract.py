"""Claims on Ray's private parts, whose failure says which module of ours depends on them, and why."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any


class Dependent:
    """A module of ours that uses private parts of Ray."""

    def __init__(self, module: str) -> None:
        self.module = module

    def message(self, why: str, difference: str) -> str:
        return f"Ray has changed below raytrain/{self.module}: {difference}. It relies on that since {why}"

    def calls(self, function: Callable[..., Any], why: str, *args: Any, **kwargs: Any) -> None:
        """It takes these arguments; `...` stands for the object that a method is of."""
        try:
            inspect.signature(function).bind(*args, **kwargs)
        except TypeError as error:
            raise AssertionError(self.message(why, f"{name_of(function)}: {error}")) from None

    def overrides(self, function: Callable[..., Any], why: str, *parameters: str) -> None:
        """Ray calls it with these parameters."""
        found = tuple(inspect.signature(function).parameters)
        assert found == parameters, self.message(why, f"{name_of(function)} takes {found}, not {parameters}")

    def has(self, owner: Any, why: str, *names: str) -> None:
        """These are attributes of a module, a class or its objects; of a class also what its code sets on `self`."""
        code = code_of(owner) if inspect.isclass(owner) else ""
        missing = [name for name in names if not hasattr(owner, name) and f"self.{name}" not in code]
        assert not missing, self.message(why, f"{name_of(owner)} has no {', '.join(missing)}")

    def mentions(self, owner: Any, why: str, *texts: str) -> None:
        """The code of a function, a class or a module has these texts in it."""
        code = code_of(owner)
        missing = [text for text in texts if text not in code]
        assert not missing, self.message(why, f"the code of {name_of(owner)} has no {', '.join(map(repr, missing))}")

    def replaces(self, function: Callable[..., Any], why: str, digest: str) -> None:
        """It does in another way what this code does, which was read as it was: read it again."""
        found = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]
        assert found == digest, self.message(why, f"the code of {name_of(function)} is now {found}, not {digest}")

    def holds(self, claim: bool, why: str, difference: str) -> None:
        assert claim, self.message(why, difference)


def code_of(owner: Any) -> str:
    """The source of a module, a function, or all methods of a class."""
    if not inspect.isclass(owner):
        return inspect.getsource(owner)
    methods = [inspect.unwrap(value) for kind in owner.__mro__ for value in vars(kind).values() if callable(value)]
    return "\n".join(map(source_of, filter(inspect.isfunction, methods)))


def source_of(method: Any) -> str:
    try:
        return inspect.getsource(method)
    except OSError:  # of a method that a dataclass has made
        return ""


def name_of(owner: Any) -> str:
    module = getattr(owner, "__module__", None)
    name = getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or repr(owner)
    return f"{module}.{name}" if module else str(name)
