"""What a task and its data sets hold besides the model: what they give by state_dict() is saved with each state.

It is kept as tensors and plain values, so that it loads with weights_only; arrays of numpy come back as arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from raytrain.engine.object_graph import MAX_OBJECTS, is_dataset
from raytrain.errors import CheckpointError, TaskError
from raytrain.task import Task

PLAIN = (bool, int, float, complex, str, bytes, type(None))
ARRAY = "raytrain.ndarray"  # key of what stands for an array: its dtype, shape and bytes
METHODS = ("state_dict", "load_state_dict")


class OwnState:
    """The state of those among a task and its data sets that have state_dict() and load_state_dict(state).

    That of rank 0 is saved, and each rank gets it at a resume.

    owners: by the name that it has in a checkpoint
    """

    def __init__(self, owners: Mapping[str, Any]) -> None:
        self.owners = owners

    @classmethod
    def of(cls, task: Task, datasets: Mapping[str, Any]) -> OwnState:
        """TaskError where one has but one of the methods, or gives what no checkpoint can hold."""
        owners: dict[str, Any] = {"task": task} if has_state(task) else {}
        for split, dataset in datasets.items():
            owners |= with_state(dataset, f"{split} data set")
        state = cls(owners)
        state.save()
        return state

    @property
    def of_datasets(self) -> bool:
        """Whether a data set has one."""
        return any(name != "task" for name in self.owners)

    def save(self) -> dict[str, Any]:
        """By owner, what it gives now, as a checkpoint can hold it; tensors are the living ones."""
        return {
            name: encoded(owner.state_dict(), f"{type(owner).__name__}.state_dict()")
            for name, owner in self.owners.items()
        }

    def put_back(self, before: Mapping[str, Any], where: str) -> None:
        """What has another state than `before`, which was saved, takes that over; nothing else is asked to."""
        now = self.save()
        for name, owner in self.owners.items():
            if not is_same(before[name], now[name]):
                OwnState({name: owner}).load({name: before[name]}, where)

    def load(self, saved: Mapping[str, Any], where: str) -> list[str]:
        """Each owner takes over its part; a line for each that has none, and for each part that nobody takes."""
        notes = []
        for name, owner in self.owners.items():
            if name in saved:
                try:
                    owner.load_state_dict(decoded(saved[name]))
                except Exception as error:
                    raise CheckpointError(
                        f"{where}: {type(owner).__name__}.load_state_dict() refuses the state of the {name} that it "
                        f"holds: {type(error).__name__}: {error}. Let it accept what state_dict() gave when that was "
                        "saved, or start a new run (--extra_tag NAME)"
                    ) from error
            else:
                notes.append(f"the checkpoint holds no state of the {name}: {type(owner).__name__} begins with its own")
        for name in saved:
            if name not in self.owners:
                notes.append(
                    f"the checkpoint holds state of the {name}, which has no load_state_dict(): it is left out"
                )
        return notes


def is_same(one: Any, other: Any) -> bool:
    """Whether two states that were `encoded` are the same to the bit; never if there is a NaN in them."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def has_state(owner: Any) -> bool:
    """Whether its class has both of METHODS; a TaskError if a task has but one."""
    written = [method for method in METHODS if callable(getattr(type(owner), method, None))]
    if isinstance(owner, Task) and len(written) == 1:
        missing = next(method for method in METHODS if method not in written)
        raise TaskError(f"{type(owner).__name__} has {written[0]}() but no {missing}(state); write both, or neither")
    return len(written) == 2


def with_state(dataset: Any, name: str) -> dict[str, Any]:
    """By name, `dataset` if it has a state, else those in it that have one, the outermost."""
    found: dict[str, Any] = {}
    for place, each in datasets_in(dataset, name):
        if has_state(each) and not any(place.startswith(f"{outer}.") for outer in found):
            found[place] = each
    return found


def datasets_in(dataset: Any, name: str, within: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """By name, `dataset` and those that it wraps: in an attribute, or in a list or dict that is one."""
    yield name, dataset
    for attribute, value in list(getattr(dataset, "__dict__", {}).items()):
        for place, inner in held_in(value).items():
            if not any(inner is each for each in (dataset, *within)):
                yield from datasets_in(inner, f"{name}.{attribute}{place}", (dataset, *within))


def held_in(value: Any) -> dict[str, Any]:
    """The data sets that an attribute is, or holds."""
    if isinstance(value, (list, tuple)):
        entries = enumerate(value[:MAX_OBJECTS]) if value and is_dataset(value[0]) else ()
        return {f"[{index}]": each for index, each in entries if is_dataset(each)}
    if isinstance(value, dict):
        first = next(iter(value.values()), None)
        return {f"[{key!r}]": each for key, each in value.items() if is_dataset(each)} if is_dataset(first) else {}
    return {"": value} if is_dataset(value) else {}


def encoded(value: Any, where: str) -> Any:
    """`value` of tensors, plain values and dicts, lists and tuples of them, with arrays written as such.

    where: how one gets there, for the error that names what cannot be kept
    """
    kind = type(value)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.detach()
    if isinstance(value, (np.ndarray, np.generic)) and not (value.dtype.hasobject or value.dtype.names):
        array = np.ascontiguousarray(value)
        flat = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
        return {ARRAY: [array.dtype.str, list(value.shape), isinstance(value, np.generic)], "bytes": flat}
    if kind in PLAIN:
        return value
    if kind in (dict, OrderedDict):
        odd = next((key for key in value if type(key) not in PLAIN), None)
        if odd is None:
            return {key: encoded(each, f"{where}[{key!r}]") for key, each in value.items()}
        raise TaskError(unkept(f"{where} has the key {odd!r:.60}, a {type(odd).__name__}"))
    if kind in (list, tuple):
        return kind(encoded(each, f"{where}[{index}]") for index, each in enumerate(value))
    if kind is set and all(type(each) in PLAIN for each in value):
        return set(value)
    raise TaskError(unkept(f"{where} is a {kind.__module__}.{kind.__qualname__}"))


def unkept(what: str) -> str:
    return (
        f"{what}, which no checkpoint holds: loading one runs no code. Give tensors, arrays, numbers, strings, and "
        "dicts, lists, tuples and sets of them"
    )


def decoded(value: Any) -> Any:
    """What was given to `encoded`; an OrderedDict as a dict."""
    if isinstance(value, dict):
        if ARRAY in value:
            return array_of(value[ARRAY], value["bytes"])
        return {key: decoded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(decoded(each) for each in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def array_of(description: list[Any], flat: torch.Tensor) -> Any:
    dtype, shape, is_number = description
    array = flat.cpu().numpy().copy().view(np.dtype(dtype)).reshape(shape)
    return array[()] if is_number else array
