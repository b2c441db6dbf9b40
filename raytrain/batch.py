"""The tensors of a batch, or of predictions, in whatever containers a task puts them.

A container is never made anew by guess: a shallow copy of it gets the new values, and one whose values stay is
handed on itself. So a defaultdict keeps its factory, a Counter its counts, and a dataclass is not initialised twice.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch

from raytrain.errors import TaskError


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """`batch` with `function` of each tensor in it; all else as it is.

    Looks into mappings, lists, tuples (named ones too), dataclasses and attrs classes, of any depth.
    """
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, batch)


def map_leaves(function: Callable[[Any], Any], batch: Any, into_objects: bool = True) -> Any:
    """`batch` with `function` of each value that is no container.

    into_objects: whether objects of dataclasses and attrs classes are containers
    """
    entries = entries_of(batch) if into_objects or fields_of(batch) is None else None
    if entries is None:
        return function(batch)
    mapped = {key: map_leaves(function, value, into_objects) for key, value in entries.items()}
    changed = {key: value for key, value in mapped.items() if value is not entries[key]}
    return with_entries(batch, mapped, changed) if changed else batch


def entries_of(batch: Any) -> Mapping[Any, Any] | None:
    """What a container holds, by key, position or field; None for what is no container."""
    if isinstance(batch, (torch.Tensor, str)):
        return None
    if isinstance(batch, Mapping):
        return {key: batch[key] for key in batch}
    if isinstance(batch, list):
        return dict(enumerate(batch))
    if moves_itself(batch):
        return None
    if isinstance(batch, tuple):
        return dict(enumerate(batch))
    names = fields_of(batch)
    return None if names is None else {name: getattr(batch, name) for name in names if hasattr(batch, name)}


def with_entries(batch: Any, entries: Mapping[Any, Any], changed: Mapping[Any, Any]) -> Any:
    """A copy of the container `batch` that holds `entries`, of which `changed` are others than its own."""
    if isinstance(batch, tuple):
        made = tuple.__new__(type(batch), entries.values())  # its own constructor may take other things
        if hasattr(batch, "__dict__"):
            vars(made).update(vars(batch))
        return made
    if isinstance(batch, (MutableMapping, list)):
        copied = copy.copy(batch)
        for key, value in changed.items():
            copied[key] = value
        return copied
    if isinstance(batch, types.MappingProxyType):
        return types.MappingProxyType(dict(entries))
    if isinstance(batch, Mapping):
        try:
            return type(batch)(entries)  # type: ignore[call-arg]
        except Exception as error:
            raise TaskError(
                f"a batch holds tensors in a {type(batch).__name__}, which cannot be changed nor made anew "
                f"({type(error).__name__}: {error}); give a dict, or write to_device(batch, device)"
            ) from error
    copied = copy.copy(batch)
    for name, value in changed.items():
        object.__setattr__(copied, name, value)  # frozen ones too, and without another __post_init__
    return copied


def fields_of(batch: Any) -> list[str] | None:
    """The fields of a dataclass or attrs class's object; None of anything else."""
    if isinstance(batch, type):
        return None
    if dataclasses.is_dataclass(batch):
        return [field.name for field in dataclasses.fields(batch)]
    attributes = getattr(type(batch), "__attrs_attrs__", None)
    return None if attributes is None else [attribute.name for attribute in attributes]


def moves_itself(value: Any) -> bool:
    """Whether it brings its tensors to a device by a method of its own: a PackedSequence, a graph."""
    return callable(getattr(type(value), "to", None)) and not isinstance(value, (torch.Tensor, torch.nn.Module))


def move_to(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors, and what moves itself, on `device`."""
    waits = device.type == "cpu"  # torch copies to the host into pinned memory, which is read before it has arrived

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=not waits)
        return leaf.to(device) if moves_itself(leaf) else leaf

    return map_leaves(move, batch)


def tensorised(batch: Any) -> Any:
    """`batch` with numpy's arrays and numbers as tensors, but for those of text and objects, and those in objects.

    Whoever writes a dataclass says what its fields are.
    """
    return map_leaves(as_tensor, batch, into_objects=False)


def as_tensor(leaf: Any) -> Any:
    """As torch's default_convert of one value, which makes containers anew."""
    if isinstance(leaf, np.ndarray):
        return leaf if leaf.dtype.kind in "SUO" else torch.as_tensor(leaf)
    return torch.as_tensor(leaf) if isinstance(leaf, np.generic) and leaf.dtype.kind not in "SUOV" else leaf


def tensors_of(batch: Any) -> list[torch.Tensor]:
    """Those that `map_tensors` sees, in order."""
    tensors: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(keep, batch)
    return tensors


def is_seen_through(batch: Any) -> bool:
    """Whether all tensors that moving it moves are plain ones that `tensors_of` sees."""
    opaque = []
    map_leaves(lambda leaf: opaque.append(leaf) if moves_itself(leaf) else leaf, batch)
    return not opaque and all(map(is_plain, tensors_of(batch)))


def is_plain(tensor: torch.Tensor) -> bool:
    """Neither sparse nor nested, which are several tensors and take no record_stream."""
    return tensor.layout is torch.strided and not tensor.is_nested


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) floating: the same numbers with C next to each other in memory; any other as it is."""
    if tensor.dim() == 4 and tensor.is_floating_point() and is_plain(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
