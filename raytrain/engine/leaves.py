"""The gradients of this process's virtual workers, merged into the nodes that it hands to the others.

A virtual worker's gradient is a leaf of the tree (engine/tree.py). Autograd adds up its micro-batches in `.grad`; it
never adds two virtual workers, whose order would then be that of this process alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raytrain.engine.layout import Layout, collect, copy_all, dense
from raytrain.engine.tree import Schedule


class Leaves:
    """Takes the gradients of one virtual worker after the other out of `.grad`, into flat buffers.

    views: by buffer, each parameter's part of it
    used:  for each parameter, whether some virtual worker of this step had a gradient here
    """

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        layout: Layout,
        schedule: Schedule,
        buffers: Sequence[Mapping[torch.dtype, torch.Tensor]],
    ) -> None:
        """buffers: as many as schedule.depth, each by dtype and as large as `layout` says at least"""
        self._params, self._arrivals = params, schedule.arrivals
        self.views = [layout.views(buffer) for buffer in buffers]
        self._flats = [[buffer[dtype][:size] for dtype, size in layout.sizes.items()] for buffer in buffers]
        self._taken = 0
        self.used = [False] * len(params)

    def begin_step(self) -> None:
        """What was taken is forgotten."""
        self._taken = 0

    @property
    def is_complete(self) -> bool:
        """Whether all virtual workers of this process have been taken."""
        return self._taken == len(self._arrivals)

    @torch.no_grad()
    def take(self) -> None:
        """The next virtual worker's gradients, out of `.grad`; zeros where there is none."""
        arrival = self._arrivals[self._taken]
        views = self.views[arrival.place]
        self._note_used(add(views, self._params) if arrival.adds else collect(views, self._params))
        for top in range(arrival.place, arrival.place - arrival.merges, -1):
            torch._foreach_add_(self._flats[top - 1], self._flats[top])

    @torch.no_grad()
    def take_of_last(self, position: int) -> None:
        """Of the last virtual worker, one parameter's gradient; `last_taken` follows once all are."""
        arrival, gradient = self._arrivals[-1], self._params[position].grad
        view = self.views[arrival.place][position]
        if gradient is None:
            view.add_(0.0) if arrival.adds else view.zero_()
        elif arrival.adds:
            view.add_(dense(gradient))
        else:
            copy_all([view], [gradient])
        for top in range(arrival.place, arrival.place - arrival.merges, -1):
            self.views[top - 1][position].add_(self.views[top][position])

    def last_taken(self) -> None:
        """Each parameter of the last virtual worker has been taken by itself."""
        self._note_used([param.grad is not None for param in self._params])

    def _note_used(self, used: list[bool]) -> None:
        self.used = [a or b for a, b in zip(self.used, used, strict=True)] if self._taken else used
        self._taken += 1


def add(views: Sequence[torch.Tensor], params: Sequence[nn.Parameter]) -> list[bool]:
    """Adds each parameter's gradient to its view; which parameters have one.

    Where there is none zero is added: it makes -0 to 0, as it does where another process adds.
    """
    grads = [p.grad for p in params]
    used = [grad is not None for grad in grads]
    with_grad = [view for view, is_used in zip(views, used, strict=True) if is_used]
    without = [view for view, is_used in zip(views, used, strict=True) if not is_used]
    if with_grad:
        torch._foreach_add_(with_grad, [dense(grad) for grad in grads if grad is not None])
    if without:
        torch._foreach_add_(without, 0.0)
    return used
