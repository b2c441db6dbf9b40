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

from raytrain.engine.layout import Layout, collect, copy_all
from raytrain.engine.reduction import CollectiveReduction
from raytrain.errors import TaskError

SEGMENT_BYTES = 25 * 2**20  # as DistributedDataParallel's buckets


@dataclasses.dataclass
class Segment:
    """Neighbouring parameters of one buffer; `missing` have no gradient yet in this backward pass."""

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
        views: Sequence[torch.Tensor],
        reduction: CollectiveReduction,
        segment_bytes: int,
    ) -> None:
        self._params, self._views, self._reduction = params, views, reduction
        self._names = {p: name for name, p in model.named_parameters()}
        order = {p: index for index, p in enumerate(model.parameters())}
        self._segments = sorted(
            segments_of(layout, segment_bytes), key=lambda s: -min(order[params[position]] for position in s.members)
        )
        self._segment_of = {position: s for s in self._segments for position in s.members}
        self.armed = False
        self._arrived = [False] * len(params)
        self._started = 0
        for position, param in enumerate(params):
            param.register_post_accumulate_grad_hook(self._hook(position))

    def arm(self) -> None:
        """The backward pass that comes is the last of this step."""
        self._reduction.open()
        self.armed, self._started = True, 0
        self._arrived = [False] * len(self._params)
        for segment in self._segments:
            segment.missing = len(segment.members)

    def finish(self) -> list[bool]:
        """Collective. Which parameters have a gradient here; every segment is on its way now."""
        self.armed = False
        # Not used in the last backward pass; an earlier one may have left a gradient.
        late = [position for position, arrived in enumerate(self._arrived) if not arrived]
        collect([self._views[position] for position in late], [self._params[position] for position in late])
        for segment in self._segments[self._started :]:
            self._reduction.start(segment.dtype, segment.start, segment.stop)
        return [param.grad is not None for param in self._params]

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
            with torch.no_grad():
                copy_all([self._views[position]], [param.grad])
            self._segment_of[position].missing -= 1
            while self._started < len(self._segments) and self._segments[self._started].missing == 0:
                segment = self._segments[self._started]
                self._reduction.start(segment.dtype, segment.start, segment.stop)
                self._started += 1

        return arrived


def segments_of(layout: Layout, segment_bytes: int) -> list[Segment]:
    """The buffers of `layout` cut between parameters into segments of at least `segment_bytes`, but for the last."""
    segments: list[Segment] = []
    for dtype in layout.sizes:
        positions = [index for index, place in enumerate(layout.places) if place.dtype is dtype]
        cut: list[int] = []
        for position in positions:
            cut.append(position)
            start, stop = layout.places[cut[0]].start, layout.places[position].stop
            if (stop - start) * dtype.itemsize >= segment_bytes or position == positions[-1]:
                segments.append(Segment(dtype, start, stop, cut))
                cut = []
    return segments
