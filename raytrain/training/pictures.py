"""A task's pictures, checked and brought to files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from raytrain.engine.randomness import seed_all
from raytrain.errors import TaskError
from raytrain.failure import explains_itself, keep_traceback
from raytrain.storage.storage import Storage
from raytrain.task import Task

PNG = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR.{8}", re.DOTALL)  # up to its width and height, which tensorboard is told


def pictures_of(
    task: Task, predictions: list[Any], dataset: Any, count: int, seed: int, epoch: int
) -> Iterator[tuple[str, bytes]]:
    """Up to `count` pictures of the task: name and PNG bytes, or a TaskError saying what came instead.

    predictions: as loop.evaluate gives them; [] where there is no checkpoint
    """
    where = f"{type(task).__name__}.pictures"
    seed_all(seed, "pictures", epoch)
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    given = task.pictures(predictions if task.has_predict() else [], dataset, min(count, len(dataset)))
    if not isinstance(given, Iterable):
        raise TaskError(f"{where} gave {type(given).__name__}; write it as a generator: yield name, png_bytes")
    names = set()
    for picture in itertools.islice(given, count):
        if not isinstance(picture, tuple) or len(picture) != 2:
            raise TaskError(f"{where} gave {type(picture).__name__} {picture!r:.60}; yield name, png_bytes")
        name, data = picture
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise TaskError(
                f"{where} named a picture {name!r:.60}; use letters, digits, _, - and . (a file is named so)"
            )
        if name in names:
            raise TaskError(f"{where} named two pictures {name}; name each for its sample, or only the last would stay")
        names.add(name)
        if not isinstance(data, bytes) or not PNG.match(data):
            raise TaskError(
                f"{where} gave {type(data).__name__} {data!r:.40} as picture {name}; give a PNG file's bytes"
            )
        yield name, data


def write_pictures(pictures: Iterable[tuple[str, bytes]], storage: Storage, folder: str) -> list[str]:
    """Write each to `folder`/NAME.png; returns the names."""
    names = []
    for name, data in pictures:
        storage.write_bytes(f"{folder}/{name}.png", data)
        names.append(name)
    return names


def why_not_drawn(error: Exception, task: Task, run_uri: str) -> str:
    """What a user is told where the lack of pictures must not end anything."""
    if explains_itself(error):
        return f"no pictures: {error}"
    said = " ".join(str(error).split())  # one line; all of it is in the traceback
    told = f"no pictures: {type(task).__name__}.pictures failed: {type(error).__name__}: {said:.200}"
    path = keep_traceback(error, run_uri)
    return f"{told} (traceback in {path})" if path else told
