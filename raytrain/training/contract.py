"""What a user's Task gave, checked before it is used: data sets, losses, predictions, metrics, pictures."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from raytrain.errors import TaskError
from raytrain.task import Task

MAX_SAMPLES = 100_000_000  # 3 GB for the order of an epoch: shuffled and dealt, for the loop and for what reads ahead


def check_dataset(dataset: Any, split: str, task: Task) -> None:
    """Raise TaskError unless `dataset` is a map-style data set with samples."""
    where = f"{type(task).__name__}.build_dataset({split!r})"
    if dataset is None:
        raise TaskError(f"{where} gave None; only the validation split may be left out")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TaskError(
            f"{where} gave {type(dataset).__name__}, which has no __getitem__: iterable data sets cannot be resumed "
            "exactly and are not supported yet; give a map-style data set with __len__ and __getitem__"
        )
    try:
        size = len(dataset)
    except Exception as error:
        raise TaskError(
            f"{where} gave {type(dataset).__name__}, whose len() fails: {type(error).__name__}: {error}"
        ) from error
    if size > MAX_SAMPLES:
        raise TaskError(
            f"{where} gave a data set of {size:,} samples; the order of an epoch is kept in memory, so {MAX_SAMPLES:,} "
            "are the most. Let len() be what an epoch shall be, and NUM_EPOCHS say how many there are"
        )
    if size == 0:
        raise TaskError(
            f"{where} gave an empty data set; there is nothing to {'train' if split == 'train' else 'evaluate'} on"
        )
