"""The gradients of a step, from `.grad` of each process to their sum over all of them, in one reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raytrain.engine.buffers import ModuleBuffers
from raytrain.engine.layout import Layout, collect
from raytrain.engine.overlap import Overlap
from raytrain.engine.reduction import CollectiveReduction, open_reduction
from raytrain.engine.tail import Combined, Tail, with_tail
from raytrain.engine.terms import Key, Sum, Terms, means_of
from raytrain.engine.world import World


class Gradients:
    """Copies the gradients into one flat buffer per dtype, and sums them over the processes.

    layout:  where each parameter's gradient lies in the buffers of `reduction`
    overlap: where gradients travel by collectives and are large: sums parts of them while backward runs
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        buffers: ModuleBuffers,
        world: World,
        reduction: str,
        segment_bytes: int,
    ) -> None:
        """Collective. `reduction` is SCALE.REDUCTION; larger gradients than segment_bytes are summed in parts."""
        self.params, self.buffers, self.world = params, buffers, world
        self.layout = Layout(params)
        self.reduction = open_reduction(with_tail(self.layout.sizes, len(params)), buffers.tensors(), world, reduction)
        self.tail = Tail(params, self.reduction)
        self.terms = Terms(self.tail.terms_addend, self.tail.terms_sum, world)
        self._addends = self.layout.views(self.reduction.addends)
        self.overlap: Overlap | None = None
        size_bytes = sum(size * dtype.itemsize for dtype, size in self.layout.sizes.items())
        if isinstance(self.reduction, CollectiveReduction) and size_bytes > segment_bytes:
            self.overlap = Overlap(model, params, self.layout, self._addends, self.reduction, segment_bytes)

    def sums(self) -> list[torch.Tensor]:
        """Each parameter's part of the sum, where `combine` leaves it."""
        return self.layout.views(self.reduction.sums)

    def last_backward_begins(self) -> None:
        """No other backward pass follows before `combine`, so gradients may travel as they arrive."""
        if self.overlap is not None:
            self.overlap.arm()

    def combine(
        self,
        loss: torch.Tensor,
        wishes: tuple[bool, ...],
        weight: torch.Tensor | None,
        terms: Mapping[Key, Sum] | None,
    ) -> Combined:
        """Collective. Sum the gradients, and what rides in their tail; the model's buffers become rank 0's."""
        used = self._collect()
        if self.world.size == 1:
            self.reduction.reduce({})
            return Combined(used, wishes, loss, weight, None if terms is None else means_of(terms))
        buffers = self.buffers.tensors()
        unstaged = self.reduction.unstaged(buffers) if self.world.is_first else {}
        has_new_term = self.terms.write(terms)
        self.tail.write(used, (*wishes, has_new_term, bool(unstaged)), loss, weight)
        self.reduction.reduce(buffers)
        summed = self.tail.read(len(wishes) + 2)
        if summed.wishes[-2]:
            self.terms.new_name_met()
        if summed.wishes[-1] and self.world.device.type == "cpu":  # a GPU would learn of it too late
            self.buffers.take_over(self.world.broadcast_object(unstaged))
        means = None if terms is None else self.terms.read()
        return summed._replace(wishes=summed.wishes[:-2], weight=None if weight is None else summed.weight, terms=means)

    def _collect(self) -> list[bool]:
        if self.overlap is not None and self.overlap.armed:
            return self.overlap.finish()
        self.reduction.open()
        return collect(self._addends, self.params)
