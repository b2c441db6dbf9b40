"""What a task measures beside its loss: sums over micro-batches, and of what each of these counts, for means."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from raytrain.errors import TaskError

MAX_TERMS = 64  # that ride in the tail; those beyond are summed by a collective of their own

Key = tuple[str, str]  # field of ModelReturn, name
Value = float | torch.Tensor  # a number, or a tensor of one


class Sum(NamedTuple):
    """Of what micro-batches gave, each times what it counts; and of what they count."""

    total: Value
    weight: Value


def together(terms: Sequence[Mapping[Key, Sum]]) -> dict[Key, Sum]:
    """The sums over several virtual workers, one after the other."""
    sums: dict[Key, Sum] = {}
    for key, each in (item for of_worker in terms for item in of_worker.items()):
        total, weight = sums.get(key, (0.0, 0.0))
        sums[key] = Sum(total + each.total, weight + each.weight)
    return sums


def means_of(terms: Sequence[Mapping[Key, Sum]]) -> dict[Key, Value]:
    """Of one process alone."""
    return {key: each.total / each.weight for key, each in together(terms).items()}


def refuse_mixture(weighted: Collection[bool | None]) -> None:
    """TaskError if some micro-batches have weights and some have not: one mean of both would be one of neither."""
    if {True, False} <= set(weighted):
        raise TaskError(
            "model_func gave ModelReturn a weight for some micro-batches and none for others; give all of them one "
            "(what the loss is the mean of: samples, tokens, boxes), or none"
        )


def row_of(numbers: Sequence[Value], like: torch.Tensor) -> torch.Tensor:
    """(n,) of the dtype and on the device of `like`, without waiting for a GPU."""
    scalars = [as_scalar(each, like) for each in numbers]
    return torch.stack(scalars) if scalars else like[:0]


def as_scalar(value: Value, like: torch.Tensor) -> torch.Tensor:
    """() of the dtype and on the device of `like`, without waiting for a GPU."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return value.to(like)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
