"""Values of the user's modules that samples and batches are made of: what another is in loader workers is named.

A loader worker has imported the modules by itself. What build_dataset has put into one since then, as `global TABLE`,
an entry of a dict or an attribute of a class, is not there; samples are then made of what the import gave.
"""

from __future__ import annotations

import datetime
import enum
import functools
import hashlib
import re
import sys
import types
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from raytrain.engine.attributes import SHORT, array_digest
from raytrain.engine.code_graph import CodeGraph, Name
from raytrain.engine.object_graph import PLAIN, is_own, key_text, name_of
from raytrain.errors import listed, masked
from raytrain.task import Task

MAX_PARTS = 1_000  # of one value that are compared; 1,000 take 1 ms
MAX_SET = 200  # entries, else its length alone: they come in any order
DEPTH = 5
HEAD = 65_536  # characters of a text
# Whose repr says all, and is no code of the user's.
TELLING = (PurePath, range, slice, re.Pattern, torch.device, torch.dtype, np.dtype, datetime.date, datetime.timedelta)


class Seen(NamedTuple):
    """A value, to be compared in another process and shown.

    digest: "" of one that could not be looked at
    """

    digest: str
    shown: str


class ModuleValues:
    """What code that makes samples and batches reads of the user's modules, by split, as the training process has it.

    Made there, and compared in each loader worker when it has made its first batch of a split. A value that has changed
    by then, since that worker began, is each process's own: a cache, a count, what is opened with the first sample.
    """

    def __init__(self, task: Task, datasets: Mapping[str, Any]) -> None:
        self._meant = {split: seen_by_name(read_values(task, dataset)) for split, dataset in datasets.items()}
        self._before: dict[Name, Seen] = {}

    def first_batch_begins(self) -> None:
        """Of any split, in this process."""
        names = {name: each for meant in self._meant.values() for name, each in meant.items()}
        self._before = {**seen_by_name(values_here(names)), **self._before}

    def differing(self, split: str) -> list[str]:
        """`scenes.TABLE (dict of 3, in loader workers None)` for each that is another one here; once, for a split."""
        meant, found = self._meant.pop(split, {}), []
        for name, here in seen_by_name(values_here(meant)).items():
            is_its_own = here.digest != self._before.get(name, here).digest
            if not is_its_own and here.digest != meant[name].digest and here.digest and meant[name].digest:
                values = f"{meant[name].shown}, in loader workers {here.shown}"
                found.append(".".join(name) + (f" ({values})" if here.shown != meant[name].shown else ""))
        return found


def differing_note(names: Sequence[str]) -> str:
    """What a user should know of what differs."""
    differ = "differs" if len(names) == 1 else "differ"
    return (
        f"{listed(names)} {differ} between the training process and loader workers: they import modules by themselves, "
        "and make samples and batches of what that gives. Set it where its module is imported, or hold it in the data "
        "set (self.table, not TABLE), which loader workers get as it is; or set LOADER.WORKERS: 0"
    )


def read_values(task: Task, dataset: Any) -> dict[Name, Any]:
    """Not what the same code sets: a loader worker does so when it needs it."""
    graph = CodeGraph(type(task).__module__.partition(".")[0])
    graph.add(dataset)
    graph.follow()
    if type(task).collate is not Task.collate:
        graph.add_method(task, "collate")
    return {name: value for name, value in graph.named.items() if name not in graph.assigned}


def values_here(names: Mapping[Name, Any]) -> dict[Name, Any]:
    """What this process has by these names; nothing of a module that it has not imported."""
    return {name: value_at(vars(sys.modules[name[0]]), name[1]) for name in names if name[0] in sys.modules}


def value_at(holder: Mapping[str, Any], path: str) -> Any:
    """What stands there; MISSING else."""
    first, _, rest = path.partition(".")
    value = holder.get(first, MISSING)
    return value_at(vars(value), rest) if rest and isinstance(value, type) else value


class Missing:
    """Stands for what is not there."""


MISSING = Missing()


def seen_by_name(values: Mapping[Name, Any]) -> dict[Name, Seen]:
    return {name: seen(value) for name, value in values.items()}


def seen(value: Any) -> Seen:
    try:
        return Seen(digest_of(value), shown(value))
    except Exception:  # a thread of the user's changes it meanwhile, or a repr of the user's fails
        return Seen("", type(value).__name__)


def digest_of(value: Any) -> str:
    return hashlib.blake2b(repr(Parts().of(value)).encode(), digest_size=16).hexdigest()


def shown(value: Any) -> str:
    if value is MISSING:
        return "none of that name"
    text = masked(repr(value)) if isinstance(value, (*PLAIN, *TELLING)) else ""
    if text and len(text) <= SHORT:
        return text
    if isinstance(value, (types.FunctionType, type)):
        return name_of(value)  # type: ignore[arg-type]
    length = f" of {len(value)}" if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset, deque)) else ""
    return type(value).__name__ + length


class Parts:
    """Writes a value as texts and tuples, alike for equal values; bounded, and nothing of the user's is called."""

    def __init__(self) -> None:
        self._left = MAX_PARTS

    def of(self, value: Any, depth: int = DEPTH) -> Any:
        self._left -= 1
        kind = name_of(type(value))
        if self._left < 0 or depth == 0:
            return kind
        if isinstance(value, enum.Enum):
            return kind, value._name_
        if isinstance(value, (str, bytes)):
            return kind, len(value), value[:HEAD], value[-HEAD:]
        if isinstance(value, (*PLAIN, *TELLING)):
            return kind, repr(value)
        if isinstance(value, (np.ndarray, torch.Tensor)):
            return kind, self._of_array(value)
        if isinstance(value, (types.FunctionType, type)):
            return kind, value.__module__, value.__qualname__
        return kind, self._of_container(value, depth - 1)

    def _of_container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            held = islice(dict.items(value), MAX_PARTS)
            return len(value), [(key_text(key, i), self.of(each, depth)) for i, (key, each) in enumerate(held)]
        if isinstance(value, (list, tuple, deque)):
            return len(value), [self.of(each, depth) for each in islice(value, MAX_PARTS)]
        if isinstance(value, (set, frozenset)):
            few = len(value) <= MAX_SET
            return len(value), sorted(repr(each) for each in value if isinstance(each, PLAIN)) if few else ()
        if isinstance(value, functools.partial):
            return [self.of(each, depth) for each in (value.func, value.args, value.keywords)]
        if isinstance(value, (staticmethod, classmethod)):
            return self.of(value.__func__, depth)
        if isinstance(value, (Namespace, types.SimpleNamespace)) or is_own(sys.modules.get(type(value).__module__)):
            return self._of_container(dict(getattr(value, "__dict__", {})), depth)
        return ()  # what cannot be seen into counts as its type

    def _of_array(self, value: Any) -> Any:
        """Its numbers, or some; of one that would have to be copied for that, its shape."""
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            return value.shape, [self.of(each) for each in islice(value.flat, MAX_PARTS)]
        is_dense = value.flags.c_contiguous if isinstance(value, np.ndarray) else is_dense_tensor(value)
        return str(value.dtype), tuple(value.shape), array_digest(value) if is_dense else ""


def is_dense_tensor(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.is_contiguous()
