"""Sums parts of the flat gradients while backward still computes the others.

For gradients that travel by collectives (GPUs, several hosts). DistributedDataParallel does the
same with buckets (Li et al., PyTorch Distributed, VLDB 2020); here the buckets are segments of the
flat buffer, so nothing is packed twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from raytrain.engine.collectives import CollectiveReduction, whole
from raytrain.engine.layout import Layout
from raytrain.engine.leaves import Leaves
from raytrain.engine.reduction import rounded
from raytrain.errors import TaskError

SEGMENT_BYTES = 25 * 2**20  # as DistributedDataParallel's buckets


@dataclasses.dataclass
class Segment:
    """A part of one buffer; of the parameters that lie in it `missing` have no gradient yet in this backward pass."""

    dtype: torch.dtype
    start: int
    stop: int
    members: list[int]
    missing: int = 0


class Overlap:
    """Copies each gradient into its place as it arrives, and starts the sum of each segment that is complete.

    Every process starts the segments in one order, that in which backward completes them if the
    modules run in the order of parameters(); a segment that is complete earlier waits its turn.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        layout: Layout,
        leaves: Leaves,
        reduction: CollectiveReduction,
        segment_bytes: int,
    ) -> None:
        self._params, self._leaves, self._reduction = params, leaves, reduction
        self._names = {p: name for name, p in model.named_parameters()}
        order = {p: index for index, p in enumerate(model.parameters())}
        self._segments = sorted(
            segments_of(layout, segment_bytes, whole(reduction.world)),
            key=lambda s: -min(order[params[position]] for position in s.members),
        )
        self._segments_of: list[list[Segment]] = [[] for _ in params]
        for segment in self._segments:
            for position in segment.members:
                self._segments_of[position].append(segment)
        self.armed = False
        self._arrived = [False] * len(params)
        self._started = 0
        for position, param in enumerate(params):
            param.register_post_accumulate_grad_hook(self._hook(position))

    def arm(self) -> None:
        """The backward pass that comes is the last of this step."""
        self.armed, self._started = True, 0
        self._leaves.last_begins()
        self._arrived = [False] * len(self._params)
        for segment in self._segments:
            segment.missing = len(segment.members)

    def finish(self) -> None:
        """Collective. The last virtual worker is taken, and every segment on its way."""
        self.armed = False
        for position, arrived in enumerate(self._arrived):
            if not arrived:  # not used in the last backward pass; an earlier one may have left a gradient
                self._leaves.take_of_last(position)
        self._leaves.last_taken()
        for segment in self._segments[self._started :]:
            self._reduction.start(segment.dtype, segment.start, segment.stop)

    def _hook(self, position: int) -> Any:
        def arrived(param: torch.Tensor) -> None:
            if not self.armed:
                return
            if self._arrived[position]:
                raise TaskError(
                    f"{self._names[self._params[position]]} got its gradient in several parts in one backward pass, as "
                    "with torch.utils.checkpoint(use_reentrant=True); use_reentrant=False gives it whole"
                )
            assert param.grad is not None, "torch calls this hook after it has set .grad"
            self._arrived[position] = True
            self._leaves.take_of_last(position)
            for segment in self._segments_of[position]:
                segment.missing -= 1
            while self._started < len(self._segments) and self._segments[self._started].missing == 0:
                segment = self._segments[self._started]
                self._reduction.start(segment.dtype, segment.start, segment.stop)
                self._started += 1

        return arrived


def segments_of(layout: Layout, segment_bytes: int, whole: int) -> list[Segment]:
    """The buffers of `layout` cut into segments of about `segment_bytes`, multiples of `whole` elements."""
    segments: list[Segment] = []
    for dtype, size in layout.sizes.items():
        length = rounded(max(1, segment_bytes // dtype.itemsize), whole)
        for start in range(0, size // whole * whole, length):
            stop = min(start + length, size // whole * whole)
            members = [
                position
                for position, place in enumerate(layout.places)
                if place.dtype is dtype and place.start < stop and place.stop > start
            ]
            if members:
                segments.append(Segment(dtype, start, stop, members))
    return segments
