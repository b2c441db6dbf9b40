"""Means over all ranks of what a task measures beside its loss, which ride in the tail of the steps that are recorded.

A task gives what names it likes, a new one in a rare step too. So ranks agree on them at the first step that is
recorded, and again after one of them has met a new name, which a flag of the tail tells the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from raytrain.engine.world import World
from raytrain.errors import TaskError

MAX_TERMS = 64  # that ride in the tail; those beyond are summed by a collective of their own

Key = tuple[str, str]  # field of ModelReturn, name
Value = float | torch.Tensor  # a number, or a tensor of one


class Sum(NamedTuple):
    """Of what micro-batches gave, each times what it counts; and of what they count."""

    total: Value
    weight: Value


def means_of(sums: Mapping[Key, Sum]) -> dict[Key, Value]:
    """Of one process alone."""
    return {key: each.total / each.weight for key, each in sums.items()}


def refuse_mixture(weighted: Collection[bool | None]) -> None:
    """TaskError if some micro-batches have weights and some have not: one mean of both would be one of neither."""
    if {True, False} <= set(weighted):
        raise TaskError(
            "model_func gave ModelReturn a weight for some micro-batches and none for others; give all of them one "
            "(what the loss is the mean of: samples, tokens, boxes), or none"
        )


class Terms:
    """Writes this process's sums into the tail before a reduction, and reads the means of all after it.

    notes: lines for the user, to be taken out
    """

    def __init__(self, addend: torch.Tensor, total: torch.Tensor, world: World) -> None:
        """addend, total: (2 * MAX_TERMS,) this process's place in the tail, and that of the sum over all"""
        self._addend, self._total, self._world = addend, total, world
        self._keys: list[Key] = []
        self._met: dict[Key, None] = {}  # in the order of the task
        self._agreed = False
        self._beyond = torch.empty(0)
        self._holds_some = False
        self.notes: list[str] = []

    def write(self, sums: Mapping[Key, Sum] | None) -> bool:
        """Collective where ranks do not agree on the names. Whether there is a name here that others may not know.

        sums: None in a step that is not recorded
        """
        if sums is None:
            if self._holds_some:
                self._addend.zero_()  # a sum in place would grow from step to step
                self._holds_some = False
            return False
        self._met |= dict.fromkeys(sums)
        if not self._agreed:
            self._agree()
        known = [value for key in self._keys for value in sums.get(key, (0.0, 0.0))]
        scalars = [as_scalar(value, self._addend) for value in known]
        numbers = torch.stack(scalars) if scalars else torch.empty(0)
        self._beyond = numbers[len(self._addend) :]
        self._addend[: len(numbers)].copy_(numbers[: len(self._addend)])
        self._holds_some = True
        return not self._met.keys() <= set(self._keys)

    def read(self) -> dict[Key, Value]:
        """Collective where there are more than MAX_TERMS. The mean of each name that some process gave.

        Asking a GPU which ones nobody gave would wait for it; there these are NaN.
        """
        numbers = self._total[: 2 * len(self._keys)]
        if len(self._beyond):
            self._world.sum_(self._beyond)
            numbers = torch.cat([numbers, self._beyond])
        totals, weights = numbers.view(-1, 2).unbind(1)
        given = weights.tolist() if weights.device.type == "cpu" else [1.0] * len(weights)
        means = (totals / weights).unbind()
        return {key: mean for key, mean, weight in zip(self._keys, means, given, strict=True) if weight}

    def new_name_met(self) -> None:
        """Some rank has one that others may not know: the next record begins with agreeing on it."""
        self._agreed = False

    def _agree(self) -> None:
        """Collective. The names of all ranks, in the order of the first one that has them."""
        new = [key for keys in self._world.all_objects(list(self._met)) for key in keys if key not in self._keys]
        if self._keys and new:
            named = ", ".join(sorted({f"{field}[{name!r}]" for field, name in new}))
            self.notes.append(
                f"{named} came up after training began: recorded from here on, as the mean over all workers"
            )
        self._keys += dict.fromkeys(new)
        self._agreed = True


def as_scalar(value: Value, like: torch.Tensor) -> torch.Tensor:
    """() of the dtype and on the device of `like`, without waiting for a GPU."""
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return value.to(like)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
