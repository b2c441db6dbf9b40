"""Data sets that a sweep builds once: every trial unpacks them anew, so that nothing gets from one to the next."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from raytrain.task import Task

MAX_BYTES = 256 << 20  # larger ones are built by each trial: pickled they would take up memory in every process
# What a data set may depend on: it is not told the other keys of OPTIMIZATION.
OF_DATA = ("OPTIMIZATION.BATCH_SIZE_PER_GPU", "OPTIMIZATION.ACCUMULATE", "OPTIMIZATION.NUM_EPOCHS")


def are_the_same_for_all(keys: Iterable[str]) -> bool:
    """Whether trials that differ in these config keys alone train on the same data."""
    return all(key.startswith("OPTIMIZATION.") and key not in OF_DATA for key in keys)


def built_and_pickled(task: Task, build: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bytes | None]:
    """What `build` gives, and the same pickled; None where it is large, or is not all that has been built.

    Left to each trial: data that holds its task or a config, whose values a trial has of its own, that does not
    pickle, and that leaves something in its task (self.num_classes = ...), the task's classes or their modules.
    """
    before, around = pickled(vars(task), of_data=False), surroundings(task)
    datasets = build()
    if before is None or before != pickled(vars(task), of_data=False) or around != surroundings(task):
        return datasets, None
    return datasets, pickled(datasets)


def surroundings(task: Task) -> list[dict[str, tuple[int, int]]]:
    """What stands in the task's own classes and their modules: by name which object, and how long if it can grow."""
    classes = [each for each in type(task).__mro__ if each not in (Task, object)]
    places = [*classes, *(sys.modules[each.__module__] for each in classes)]
    return [
        {name: (id(value), len(value) if isinstance(value, (list, dict, set)) else 0) for name, value in items}
        for items in ([*vars(place).items()] for place in places)
    ]


def pickled(content: Any, of_data: bool = True) -> bytes | None:
    """`content` as `pickle.loads` takes it; None if that is not to be had.

    of_data: it is not to be had where a task or a config is in it
    """
    file = io.BytesIO()
    try:
        DatasetPickler(file, of_data).dump(content)
    except Exception:  # whatever a __reduce__ of the user's raises
        return None
    return file.getvalue() if file.tell() <= MAX_BYTES else None


def unpickled(content: bytes) -> Any:
    """What `pickled` was given, anew. For what came from this sweep's own driver only: unpickling runs code."""
    return pickle.loads(content)


class DatasetPickler(pickle.Pickler):
    """Gives up on what `pickled` is not to hold, and on large arrays before it copies them."""

    def __init__(self, file: io.BytesIO, of_data: bool) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._of_data, self._num_bytes = of_data, 0

    def persistent_id(self, each: Any) -> None:
        if self._of_data and isinstance(each, (BaseModel, Task)):
            raise pickle.PicklingError("it would tell every trial the same config")
        if isinstance(each, (np.ndarray, torch.Tensor)):
            self._num_bytes += each.nbytes
            if self._num_bytes > MAX_BYTES:
                raise pickle.PicklingError("it is large")
