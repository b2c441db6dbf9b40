"""What rides behind the gradients, so that it costs no collective of its own: used flags, wishes, loss, terms, buffers.

The last numbers of a flat buffer: those of a model's buffers that become means; for each parameter whether a process
used it, for each wish whether one has it, the loss, the sum of the weights, and what is recorded beside the loss. They
are summed as the gradients are, in the same order, which for losses and buffers is that of the virtual workers; what of
the flags is above 0 then, some process had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from raytrain.engine.buffer_means import BufferMeans
from raytrain.engine.late import LateReader
from raytrain.engine.reduction import Reduction
from raytrain.engine.terms import MAX_TERMS, Key, Value
from raytrain.engine.tree import Schedule, merged

MAX_WISHES = 4  # of the loop two; two are the engine's own
NUM_NUMBERS = 2 + 2 * MAX_TERMS  # behind flags and wishes


class LeafLoss(NamedTuple):
    """What the micro-batches of one leaf lost, each by its share or weight, and the sum of the weights if they have
    some: scalars on the device."""

    loss: torch.Tensor
    weight: torch.Tensor | None = None


class Combined(NamedTuple):
    """What all processes together used, wished and lost.

    used:   for each parameter, whether it has a gradient
    loss:   the sum over all virtual workers, in the tree's order: a scalar on the device
    weight: the sum of their weights, by which gradients and loss are still to be divided; None: they are shares of 1
    terms:  the means of what is recorded beside the loss; None in a step that is not recorded
    """

    used: Sequence[bool]
    wishes: tuple[bool, ...]
    loss: torch.Tensor
    weight: torch.Tensor | None = None
    terms: dict[Key, Value] | None = None


def with_tail(
    sizes: Mapping[torch.dtype, int], num_params: int, means: BufferMeans | None = None
) -> dict[torch.dtype, int]:
    """`sizes` of flat buffers, with room for a tail behind the gradients."""
    dtype = torch.float64 if means is not None and means.is_f64 else tail_dtype(sizes)
    num_means = 0 if means is None else means.numbers
    return {**sizes, dtype: sizes.get(dtype, 0) + num_means + num_params + MAX_WISHES + NUM_NUMBERS}


def tail_dtype(buffers: Mapping[torch.dtype, object]) -> torch.dtype:
    """Of the flat buffer that has the tail: the finest, as a loss in f64 is told in f64."""
    return torch.float64 if torch.float64 in buffers else torch.float32


class Tail:
    """Writes this process's part of the tail before a reduction, and reads the sum after it.

    On a GPU asking for the flags would wait for it. There parameters that no process uses get zero gradients, and the
    wishes are those of LATE_STEPS ago.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], reduction: Reduction, here: Schedule, means: BufferMeans | None = None
    ) -> None:
        """reduction: of buffers as large as with_tail() says;  here: how its nodes come of this process's leaves"""
        self._params, self._here, self._means = params, here, means
        num_means = 0 if means is None else means.numbers
        dtype, parts = tail_dtype(reduction.sums), [num_means, len(params) + MAX_WISHES, 2, 2 * MAX_TERMS]
        of_nodes = [node[dtype][-sum(parts) :].split(parts) for node in reduction.nodes]
        self._means_addends, flags, self._losses_addends, self._terms_addends = zip(*of_nodes, strict=True)
        self._flags_addend = flags[0]
        sums = reduction.sums[dtype][-sum(parts) :].split(parts)
        self._means_sum, self._flags_sum, self._losses_sum, self.terms_sum = sums
        self._written: tuple[list[bool], tuple[bool, ...]] | None = None
        self._flags = torch.empty(0)
        self._late_wishes = LateReader()

    def write(self, used: list[bool], wishes: tuple[bool, ...], losses: Sequence[LeafLoss]) -> None:
        """What this process used and wishes, and what each of its leaves lost."""
        if self._written != (used, wishes):  # seldom; else what stands on the device is copied, without the host
            self._written = (used, wishes)
            flags = [*used, *wishes, *[False] * (MAX_WISHES - len(wishes))]
            self._flags = torch.tensor(flags, dtype=self._flags_sum.dtype).to(self._flags_sum.device)
        self._flags_addend.copy_(self._flags)
        for addend, node in zip(self._losses_addends, self.of_nodes(losses), strict=True):
            for place, value in enumerate(each for each in node if each is not None):
                addend[place].copy_(value)

    def of_nodes(self, losses: Sequence[LeafLoss]) -> list[LeafLoss]:
        """The sums of `losses` in each node of this process; of several leaves in the tail's dtype."""
        if len(losses) == 1:
            return list(losses)
        dtype, arrivals = self._losses_sum.dtype, self._here.arrivals
        sums = merged([leaf.loss.to(dtype) for leaf in losses], arrivals)
        weights = [leaf.weight.to(dtype) for leaf in losses if leaf.weight is not None]
        if not weights:
            return [LeafLoss(each) for each in sums]
        return list(map(LeafLoss, sums, merged(weights, arrivals)))

    def write_means(self) -> None:
        """What each leaf here has left in the buffers that become means."""
        if self._means is not None:
            for addend, node in zip(self._means_addends, self._added(self._means.rows), strict=True):
                addend.copy_(node)

    def read_means(self, virtual_workers: int) -> None:
        """These buffers become the mean of what all wrote."""
        if self._means is not None:
            self._means.take(self._means_sum / virtual_workers)

    def _added(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of each node of this process, the sum over its virtual workers."""
        dtype, arrivals = self._means_sum.dtype, self._here.arrivals
        of_leaves = [row.to(dtype) for row in rows]
        if len(arrivals) < len(rows):  # the process is one leaf, whatever it hosts
            return [torch.stack(of_leaves).sum(0)]
        return merged(of_leaves, arrivals)

    def write_terms(self, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The numbers of each leaf here; of each node, those that have no room in the tail."""
        nodes = merged(rows, self._here.arrivals)
        for addend, node in zip(self._terms_addends, nodes, strict=True):
            addend[: len(node)].copy_(node[: len(addend)])
        return [node[2 * MAX_TERMS :] for node in nodes]

    def clear_terms(self) -> None:
        """No numbers are there."""
        for addend in self._terms_addends:
            addend.zero_()

    def read(self, num_wishes: int) -> Combined:
        """What all processes together wrote."""
        num_used, (loss, weight) = len(self._params), self._losses_sum.clone().unbind()
        if self._flags_sum.device.type == "cpu":
            flags = [value > 0 for value in self._flags_sum.tolist()]
            return Combined(flags[:num_used], tuple(flags[num_used : num_used + num_wishes]), loss, weight)
        counts = self._late_wishes.swap(self._flags_sum[num_used : num_used + num_wishes]) or [0.0] * num_wishes
        return Combined([p.requires_grad for p in self._params], tuple(count > 0 for count in counts), loss, weight)
