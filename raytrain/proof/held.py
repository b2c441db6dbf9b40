"""What task, data set and model hold besides what a checkpoint has, by the path that one would write to it."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from typing import Any, NamedTuple

import numpy as np
import torch

from raytrain.data.split import HEAD_BYTES
from raytrain.engine.attributes import OF_TASKS, SHORT, attribute_of
from raytrain.engine.object_graph import CONTAINERS, PLAIN, digest, value_of, walk
from raytrain.task import Task

GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator, torch.Generator)
OF_MODULES = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
HOOKS = re.compile(r"\._\w*hooks")  # numbered by torch, through the whole process
ABSENT = "nothing"  # an empty list is nothing as well


class Change(NamedTuple):
    """An attribute that is not the same in two trials, with its value in each."""

    name: str
    before: str
    now: str

    def __str__(self) -> str:
        if self.before.startswith("#") or self.now.startswith("#"):  # what merely stands for a value
            return self.name
        return f"{self.name} ({self.before} straight, {self.now} here)"


def held_by(model: torch.nn.Module, task: Task, dataset: Any) -> dict[str, str]:
    """Attribute -> value, as a text that can be compared and is short enough to be shown; beginning with # if not.

    Beside a list or dict stands one text for all that is in it, by `[...]` behind its name: it may be long.
    """
    roots = {type(model).__name__: model, type(dataset).__name__: dataset, type(task).__name__: task}
    known = {id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())}
    raytrains = tuple(f"{type(task).__name__}.{name}" for name in OF_TASKS)
    found: dict[str, str] = {}
    within: dict[str, Any] = {}
    for path, value in walk(roots, into_code=True):
        if id(value) in known or isinstance(value, GENERATORS) or path.startswith(raytrains) or HOOKS.search(path):
            continue
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:  # what a forward pass leaves behind
            continue
        text, path = shown(value), OF_MODULES.sub(r".\1", path)
        attribute = attribute_of(path)
        if text is not None and attribute == path:
            found[path] = text
        elif text is not None:
            within.setdefault(attribute, hashlib.blake2b(digest_size=16)).update(f"{path} {text}\n".encode())
    return found | {f"{attribute}[...]": f"#{content.hexdigest()}" for attribute, content in within.items()}


def shown(value: Any) -> str | None:
    """None of what cannot be seen into."""
    if isinstance(value, (*PLAIN, itertools.count)):
        text = repr(value)
        return text if len(text) <= SHORT else hashed(text)
    if isinstance(value, CONTAINERS):
        return f"{type(value).__name__} of {len(value)}"
    content = value_of(value, HEAD_BYTES)
    return None if isinstance(content, str) else hashed(repr(content))


def hashed(text: str) -> str:
    return f"#{digest(text.encode()).hex()}"


def changes(before: dict[str, str], now: dict[str, str]) -> list[Change]:
    """One for each attribute that is not the same, numbers first, arrays last: they may only follow from it."""
    found: dict[str, Change] = {}
    for path in dict.fromkeys([*before, *now]):
        one, other = before.get(path, ABSENT), now.get(path, ABSENT)
        if one != other:
            found.setdefault(attribute_of(path), Change(attribute_of(path), one, other))
    return sorted(found.values(), key=lambda change: (change.before[:1] == "#", not change.before[:1].isdigit()))
