"""What rides behind the gradients, so that it costs no collective of its own: used flags, wishes, the loss.

The last numbers of a flat buffer: for each parameter whether a process used it, for each wish whether one has it,
then the loss. They are summed as the gradients are, in the same order: what is above 0 then, some process had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from raytrain.engine.late import LateReader
from raytrain.engine.reduction import Reduction

MAX_WISHES = 3  # of the loop two; one is the engine's own


class Combined(NamedTuple):
    """What all processes together used, wished and lost.

    used: for each parameter, whether it has a gradient
    loss: the mean over all micro-batches of all virtual workers: a scalar on the device
    """

    used: Sequence[bool]
    wishes: tuple[bool, ...]
    loss: torch.Tensor


def with_tail(sizes: Mapping[torch.dtype, int], num_params: int) -> dict[torch.dtype, int]:
    """`sizes` of flat buffers, with room for a tail behind the gradients."""
    dtype = tail_dtype(sizes)
    return {**sizes, dtype: sizes.get(dtype, 0) + num_params + MAX_WISHES + 1}


def tail_dtype(buffers: Mapping[torch.dtype, object]) -> torch.dtype:
    """Of the flat buffer that has the tail: the finest, as a loss in f64 is told in f64."""
    return torch.float64 if torch.float64 in buffers else torch.float32


class Tail:
    """Writes this process's part of the tail before a reduction, and reads the sum after it.

    On a GPU asking for the flags would wait for it. There parameters that no process uses get zero gradients, and the
    wishes are those of LATE_STEPS ago.
    """

    def __init__(self, params: Sequence[nn.Parameter], reduction: Reduction) -> None:
        """reduction: of buffers as large as with_tail() says"""
        self._params = params
        dtype, size = tail_dtype(reduction.sums), len(params) + MAX_WISHES + 1
        addends, self._sum = reduction.addends[dtype][-size:], reduction.sums[dtype][-size:]
        self._flags_addend, self._loss_addend, self._loss_sum = addends[:-1], addends[-1], self._sum[-1]
        self._written: tuple[list[bool], tuple[bool, ...]] | None = None
        self._flags = torch.empty(0)
        self._late_wishes = LateReader()

    def write(self, used: list[bool], wishes: tuple[bool, ...], loss: torch.Tensor) -> None:
        """What this process used, wishes and lost."""
        if self._written != (used, wishes):  # seldom; else what stands on the device is copied, without the host
            self._written = (used, wishes)
            flags = [*used, *wishes, *[False] * (MAX_WISHES - len(wishes))]
            self._flags = torch.tensor(flags, dtype=self._sum.dtype).to(self._sum.device)
        self._flags_addend.copy_(self._flags)
        self._loss_addend.copy_(loss)

    def read(self, num_wishes: int) -> Combined:
        """What all processes together wrote."""
        loss, num_used = self._loss_sum.clone(), len(self._params)
        if self._sum.device.type == "cpu":
            flags = [value > 0 for value in self._sum.tolist()]
            return Combined(flags[:num_used], tuple(flags[num_used : num_used + num_wishes]), loss)
        counts = self._late_wishes.swap(self._sum[num_used : num_used + num_wishes]) or [0.0] * num_wishes
        return Combined([p.requires_grad for p in self._params], tuple(count > 0 for count in counts), loss)
