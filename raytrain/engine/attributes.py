"""Which plain attributes of objects changed between two looks: counters, lists, small arrays.

Not random generators: engine/randomness.py seeds them for each draw. Once an epoch at most, and bounded: a few values
of what is long, a few levels of what is deep.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from raytrain.engine.object_graph import is_own

DEPTH = 5
ELEMENTS = 100  # of a container or an array that are looked at
VALUES = 20_000  # of all that is looked at
ARRAY = "#array"  # begins what stands for one
SHORT = 40  # characters of a value that is shown
NUMBERS = (bool, int, float, complex)
OF_MODULES = frozenset(vars(nn.Module()))
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OF_TASKS = frozenset(["cfg", "_notes", "_progress"])  # raytrain's own; a task may be a module besides
Look = dict[str, str]  # path, such as MyTask.steps or MyTask.history[3] -> what stands there, short enough to be shown


def look(roots: Mapping[str, Any], known: Iterable[Any] = ()) -> Look:
    """The plain values below `roots`, by their paths; nothing below what is `known`.

    What is None is not there yet. Tensors with a gradient function are scratch: what a forward pass leaves behind.
    """
    seen = {id(each) for each in known}
    found: Look = {}
    for name, root in roots.items():
        found.update(itertools.islice(_values(root, name, seen, DEPTH), VALUES))
    return found


def look_into_model(model: nn.Module) -> Look:
    """The same for what a model's modules hold besides parameters, buffers that are saved, and submodules.

    Of torch's own modules it is hooks and buffers alone. A buffer that gets another shape is a cache that grows.
    """
    modules = {name: module for name, module in model.named_modules() if not _is_of_torch(module)}
    return look({**_held_by_modules(model, modules), **_unsaved_of_modules(model)}, known=parts_of(model))


def array_digests(model: nn.Module, roots: Mapping[str, Any], known: Iterable[Any]) -> Look:
    """Of arrays and tensors that `roots` and the model's modules hold, but for parameters and buffers; by attribute."""
    held = _held_by_modules(model, dict(model.named_modules()))
    of_all = look({**roots, **held}, known=[*parts_of(model), *known])
    by_attribute: dict[str, list[str]] = {}
    for path, value in of_all.items():
        if value.startswith(ARRAY):
            by_attribute.setdefault(attribute_of(path), []).append(value)
    return {name: _digest("".join(values).encode()) for name, values in by_attribute.items()}


def _held_by_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    roots: dict[str, Any] = {}
    for name, module in modules.items():
        if type(module).get_extra_state is nn.Module.get_extra_state:  # else it says itself what to save
            own = {key: value for key, value in vars(module).items() if key not in OF_MODULES}
            roots |= {".".join(filter(None, [type(model).__name__, name, key])): each for key, each in own.items()}
    return roots


def _unsaved_of_modules(model: nn.Module) -> dict[str, Any]:
    """Buffers that are not saved, and numbers of hooks, of torch's own modules too."""
    roots: dict[str, Any] = {}
    for name, module in model.named_modules():
        path = ".".join(filter(None, [type(model).__name__, name]))
        hidden = {key: module._buffers.get(key) for key in module._non_persistent_buffers_set}
        roots |= {f"{path}.{key}[{tuple(each.shape)}]": each for key, each in hidden.items() if each is not None}
        roots |= {f"{path}.{key}": len(vars(module)[key]) for key in HOOKS if vars(module)[key]}
    return roots


def parts_of(model: nn.Module) -> list[Any]:
    """What a checkpoint holds of a model, whoever else holds it: a list of weights, a module around some of it."""
    hidden = {id(module._buffers.get(key)) for module in model.modules() for key in module._non_persistent_buffers_set}
    return [*model.modules(), *model.parameters(), *(each for each in model.buffers() if id(each) not in hidden)]


class Saved:
    """What a state holds, as two looks into that show it, `before` and `now`."""

    def __init__(self, before: Look, now: Look) -> None:
        self._names = {word.strip("_") for path in now for word in re.findall(r"\w+", path)}
        self._moves = {(before[path], now[path]) for path in before.keys() & now.keys()}

    def holds(self, path: str, before: str, now: str) -> bool:
        """Whether an attribute is in there: by its name, or as something in there changed in the same way."""
        return (before, now) in self._moves or attribute_of(path).rpartition(".")[2].strip("_") in self._names


def changes(before: Look, now: Look, saved: Saved) -> list[str]:
    """`MyTask.steps (0, now 32)` for each attribute that stands in both with another value, unless it is saved."""
    found: dict[str, str] = {}
    for path, value in before.items():
        if path in now and now[path] != value and not saved.holds(path, value, now[path]):
            shown = not path.startswith("len(") and not (value + now[path]).startswith("#")
            found.setdefault(attribute_of(path), f" ({value}, now {now[path]})" if shown else "")
    return [f"{name}{values}" for name, values in found.items()]


class Watch:
    """Which epochs are watched, of those that this process has a part in: 0, 1, 2, 4, 8 and so on.

    What changes late in a run is seen too, if it was there in epoch 0 (else it is scratch, most likely), and watching
    takes next to nothing of a long one. Each name is told once.
    """

    def __init__(self) -> None:
        self._epochs = 0
        self._paths: set[str] = set()
        self._told: set[str] = set()

    def epoch_begins(self) -> bool:
        """Whether this one is watched."""
        epochs, self._epochs = self._epochs, self._epochs + 1
        return epochs & (epochs - 1) == 0

    def known(self, found: Look) -> Look:
        """Of a look at the start of an epoch that is watched, what is to be compared at its end."""
        if self._epochs == 1:
            self._paths |= found.keys()
        return {path: value for path, value in found.items() if path in self._paths}

    def new(self, found: Sequence[str]) -> list[str]:
        """Those of `changes` that were not told yet; they are now."""
        names = [each.partition(" ")[0] for each in found]
        new = [each for each, name in zip(found, names, strict=True) if name not in self._told]
        self._told |= set(names)
        return new


def attribute_of(path: str) -> str:
    """`MyTask.history` of `len(MyTask.history)` and of `MyTask.history[3].x`."""
    return path.removeprefix("len(").removesuffix(")").partition("[")[0]


def _values(value: Any, path: str, seen: set[int], depth: int) -> Iterator[tuple[str, str]]:
    if value is None or depth == 0:
        return
    if isinstance(value, (str, bytes, *NUMBERS, np.generic)):
        yield path, _shown(repr(value))
        return
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if id(value) not in seen and not (isinstance(value, torch.Tensor) and value.grad_fn is not None):
            yield path, array_digest(value)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, itertools.count):
        yield path, _digest(repr(value).encode())
    elif isinstance(value, dict):
        for key in _some(value):
            if isinstance(key, (str, *NUMBERS)):
                yield from _values(value[key], f"{path}[{key!r}]", seen, depth - 1)
    elif isinstance(value, (list, tuple, deque)):
        yield f"len({path})", str(len(value))
        for index in _some(range(len(value))):
            yield from _values(value[index], f"{path}[{index}]", seen, depth - 1)
    elif isinstance(value, (set, frozenset)):
        yield f"len({path})", str(len(value))
    elif _is_users(value):
        yield from _values_of_object(value, path, seen, depth)


def _values_of_object(value: Any, path: str, seen: set[int], depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, nn.Module):
        for name, tensor in itertools.chain(value.named_parameters(), value.named_buffers()):
            yield from _values(tensor, f"{path}.{name}", seen, depth)
        skipped = OF_MODULES | OF_TASKS
    else:
        skipped = OF_TASKS
    slots = [name for kind in type(value).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    own = {name: getattr(value, name, None) for name in slots if name != "__dict__"} | getattr(value, "__dict__", {})
    for name, each in own.items():
        if name not in skipped:
            yield from _values(each, f"{path}.{name}", seen, depth - 1)


def array_digest(value: Any) -> str:
    """Of all of a small one, of some numbers of a large one."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_meta:
            return ARRAY
        flat = value.detach().reshape(-1)
        step = 1 if flat.numel() <= VALUES else flat.numel() // ELEMENTS
        some = flat[::step].cpu().contiguous()
        data = some.view(torch.uint8).numpy().tobytes() if some.numel() else b""
        return ARRAY + _digest(f"{value.dtype} {tuple(value.shape)}".encode() + data)
    flat = value.reshape(-1)[:: 1 if value.size <= VALUES else value.size // ELEMENTS]
    data = repr(flat[:ELEMENTS].tolist()).encode() if value.dtype.hasobject else np.ascontiguousarray(flat).tobytes()
    return ARRAY + _digest(f"{value.dtype} {value.shape}".encode() + data)


def _shown(text: str) -> str:
    """A value of few characters itself, else what stands for it, which begins with #."""
    return text if len(text) <= SHORT else _digest(text.encode())


def _digest(data: bytes) -> str:
    return "#" + hashlib.blake2b(data, digest_size=16).hexdigest()


def _some(keys: Any) -> list[Any]:
    """All keys of a small container; of a large one, some that are the same at the next look."""
    if len(keys) <= 10 * ELEMENTS:
        return list(keys)
    return [*itertools.islice(keys, ELEMENTS), *(keys[-ELEMENTS:] if isinstance(keys, range) else ())]


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _is_of_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _is_users(value: Any) -> bool:
    """Whether it is an object with attributes that somebody wrote a class for: no function, class, module or file."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return False
    home = type(value).__module__
    if isinstance(value, nn.Module) or (home == "types" and type(value).__name__ == "SimpleNamespace"):
        return True
    if hasattr(type(value), "close") and not is_own(sys.modules.get(home)):  # a progress bar, a writer, a file of HDF5
        return False
    return home.partition(".")[0] not in sys.stdlib_module_names and not home.startswith("raytrain.config")
