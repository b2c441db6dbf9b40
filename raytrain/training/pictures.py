"""A task's pictures, checked and brought to files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raytrain.data.feed import Feed
from raytrain.engine.state import RunState
from raytrain.errors import explains_itself, keep_traceback
from raytrain.journal.journal import Journal
from raytrain.journal.run_folder import RunFolder
from raytrain.storage.storage import Storage
from raytrain.task import Task
from raytrain.training.contract import pictures_of


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
    message = f"no pictures: {type(task).__name__}.pictures failed: {type(error).__name__}: {said:.200}"
    path = keep_traceback(error, run_uri)
    return f"{message} (traceback in {path})" if path else message


def draw_pictures(folder: RunFolder, run: RunState, feed: Feed, predictions: list[Any], journal: Journal) -> str | None:
    """Draw what an evaluation predicted; where the pictures lie, None if there are none.

    What goes wrong is told and left at that: the run is trained, saved and evaluated, and must not end as failed.
    """
    task, count = feed.task, run.config["EVAL"]["PICTURES"]
    if not (predictions and task.has_pictures() and count):
        return None
    dataset = feed.datasets["val"]
    name, epoch = f"eval/epoch_{run.progress.epoch}/val/pictures", run.progress.epoch
    try:
        pictures = pictures_of(task, predictions, dataset, count, run.seed, epoch)
        names = write_pictures(pictures, folder.here, name)
    except Exception as error:
        message = why_not_drawn(error, task, folder.storage.path_of(""))
        journal.write("event", event="warning", message=message)
        return None
    journal.write("pictures", step=run.progress.step, epoch=epoch, folder=name, names=names)
    return folder.storage.path_of(name) if names else None
