"""What a user's Task gave, checked before it is used: data sets, losses, predictions, metrics, pictures."""

from __future__ import annotations

import itertools
import math
import numbers
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset

from raytrain.batch import map_tensors, move_to
from raytrain.data.split import set_epochs_of
from raytrain.engine.randomness import Randomness
from raytrain.engine.terms import Key, Sum
from raytrain.errors import TaskError
from raytrain.task import ModelReturn, Task

MAX_SAMPLES = 100_000_000  # 3 GB for the order of an epoch: shuffled and dealt, for the loop and for what reads ahead

PNG = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR.{8}", re.DOTALL)  # up to its width and height, which tensorboard is told

FIELDS = ("tb_dict", "disp_dict")  # of ModelReturn


class Part(NamedTuple):
    """One micro-batch of a step.

    loss:  the scalar
    share: what it counts in the step's means: its share of the samples, or its weight as a scalar on the device
    """

    returned: ModelReturn
    loss: torch.Tensor
    share: float | torch.Tensor


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


def loss_of(returned: ModelReturn, task: Task) -> torch.Tensor:
    """The scalar loss of a ModelReturn, or a TaskError saying what came instead."""
    loss = getattr(returned, "loss", None)
    if not isinstance(loss, torch.Tensor):
        given = "None" if returned is None else f"{type(returned).__name__} with loss {type(loss).__name__}"
        raise TaskError(
            f"{type(task).__name__}.model_func gave {given}; "
            "return raytrain.ModelReturn(loss, tb_dict, disp_dict) with a tensor as its loss"
        )
    if not loss.is_floating_point() or loss.numel() == 0:
        raise TaskError(
            f"{type(task).__name__}.model_func gave a loss of {loss.dtype} and shape {tuple(loss.shape)}; "
            "it must be one floating-point number, or several to be averaged"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TaskError(
            f"{type(task).__name__}.model_func gave a loss that does not depend on any trainable parameter, so nothing "
            "can be learnt from it; look for detach(), .item(), .data, argmax, numpy or no_grad() on its way"
        )
    return loss if loss.dim() == 0 else loss.mean()


def predictions_of(task: Task, model: torch.nn.Module, batch: Any, num_samples: int) -> list[Any]:
    """One entry for each sample, on the host."""
    predictions = task.predict(model, batch)
    listed = hasattr(predictions, "__len__") and not isinstance(predictions, (dict, str))
    if not listed or getattr(predictions, "shape", None) == () or len(predictions) != num_samples:
        size = f" of shape {tuple(predictions.shape)}" if isinstance(predictions, torch.Tensor) else ""
        size = f" of length {len(predictions)}" if listed and not size else size
        raise TaskError(
            f"{type(task).__name__}.predict gave {type(predictions).__name__}{size} for a batch of {num_samples} "
            "samples; give a list or tensor with one entry for each sample"
        )
    return list(move_to(map_tensors(torch.Tensor.detach, predictions), torch.device("cpu")))


def checked_metrics(metrics: Any, task: Task) -> dict[str, float]:
    """Plain floats by name, or a TaskError."""
    if not isinstance(metrics, dict):
        raise TaskError(
            f"{type(task).__name__}.score gave {type(metrics).__name__}; give a dict of name -> number, "
            'such as {"accuracy": 0.97}'
        )
    checked = {}
    for name, value in metrics.items():
        try:
            checked[str(name)] = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TaskError(
                f"{type(task).__name__}.score gave {name!r} the value {value!r:.60}, which is no number; "
                "give a dict of name -> number"
            ) from error
    return checked


def part_of(returned: ModelReturn, share: float, task: Task) -> Part:
    """What a forward pass gave, checked. share: of the samples of the step, which counts where there is no weight."""
    loss, weight = loss_of(returned, task), getattr(returned, "weight", None)
    return Part(returned, loss, share if weight is None else weight_of(weight, loss, task))


def weight_of(weight: Any, loss: torch.Tensor, task: Task) -> torch.Tensor:
    """The weight of a ModelReturn as a scalar beside its loss; NaN for a negative one on a GPU, which is not asked."""
    dtype = torch.float64 if loss.dtype is torch.float64 else torch.float32
    given: Any = weight
    if isinstance(weight, torch.Tensor) and weight.numel() == 1 and not weight.is_complex():
        if weight.device.type != "cpu":
            scalar = weight.detach().reshape(()).to(loss.device, dtype)
            return torch.where(scalar >= 0, scalar, math.nan)
        given = weight.item()
    if not isinstance(given, numbers.Real) or not 0 <= float(given) < math.inf:
        raise TaskError(
            f"{type(task).__name__}.model_func gave {weight!r:.60} as weight; give how many samples, tokens, boxes (or "
            "whatever the loss is the mean of) there are: 0 or more, one number or a tensor of one"
        )
    return torch.full((), float(given), dtype=dtype, device=loss.device)


def sums_of(parts: Sequence[Part], task: Task) -> dict[Key, Sum]:
    """Of each name in tb_dict and disp_dict, what the micro-batches that have it gave, each times what it counts."""
    sums: dict[Key, Sum] = {}
    for part, field in itertools.product(parts, FIELDS):
        share = part.share
        for name, value in checked_terms(part.returned, field, task).items():
            # As the loss: what counts nothing may be NaN.
            counted = torch.where(share > 0, value * share, 0.0) if torch.is_tensor(share) else value * share
            total, weight = sums.get((field, name), (0.0, 0.0))
            sums[field, name] = Sum(total + counted, weight + share)
    return sums


def checked_terms(returned: ModelReturn, field: str, task: Task) -> dict[str, Any]:
    """Numbers and scalar tensors by name, or a TaskError."""
    terms = getattr(returned, field)
    if not isinstance(terms, dict):
        raise TaskError(f"{type(task).__name__}.model_func gave {terms!r:.60} as {field}; give name -> number")
    checked = {}
    for name, value in terms.items():
        if not isinstance(value, numbers.Real) and not (isinstance(value, torch.Tensor) and value.numel() == 1):
            raise TaskError(
                f"{type(task).__name__}.model_func gave {field}[{name!r}] = {value!r:.60}; "
                "give one number or a tensor of one number"
            )
        checked[name] = value.detach().reshape(()) if isinstance(value, torch.Tensor) else float(value)
    return checked


def pictures_of(
    task: Task, predictions: list[Any], dataset: Any, count: int, seed: int, epoch: int
) -> Iterator[tuple[str, bytes]]:
    """Up to `count` pictures of the task: name and PNG bytes, or a TaskError saying what came instead.

    predictions: as validate.evaluate gives them; [] where there is no checkpoint
    """
    where = f"{type(task).__name__}.pictures"
    Randomness(dataset=dataset, task=task).seed(seed, "pictures", epoch)
    for set_epoch in set_epochs_of(dataset).values():
        set_epoch(epoch)
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
