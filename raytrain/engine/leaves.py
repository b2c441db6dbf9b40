"""The gradients of this process's virtual workers, merged into the nodes that it hands to the others.

A virtual worker's gradient is a leaf of the tree (engine/tree.py). Autograd adds up its micro-batches in `.grad`, and
two neighbours where the tree does: a leaf of one micro-batch onto its sibling. All else is added here.

A parameter that a leaf does not use counts as -0.0 there, which added to anything changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from raytrain.engine.layout import Layout, collect, copy_all, dense
from raytrain.engine.tree import Arrival, Node, Schedule, Stack
from raytrain.errors import TaskError


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
        nodes: Sequence[Mapping[torch.dtype, torch.Tensor]],
    ) -> None:
        """nodes: a buffer for each of schedule.nodes, by dtype, as large as `layout` says at least"""
        self._params, self._layout, self._schedule = params, layout, schedule
        self.views: list[list[torch.Tensor]] = []
        self._flats: list[list[torch.Tensor]] = []
        for buffers in nodes:
            self._add_buffer(buffers)
        self._stack = Stack(schedule.leaves)
        self._leaf = schedule.nodes[0][0]
        self._in_grad: Node | None = None
        self._last = Arrival(0, False, 0)
        self.used = [False] * len(params)
        self._is_first = True

    def begin_step(self) -> None:
        """What was taken is forgotten."""
        self._stack.clear()
        self._leaf, self._in_grad, self._is_first = self._schedule.nodes[0][0], None, True

    @torch.no_grad()
    def leaf_done(self, next_is_single: bool) -> bool:
        """The next virtual worker's gradient stands in `.grad`, behind what was left there. Whether it was taken.

        next_is_single: the virtual worker that follows, if one does, has one backward pass
        """
        node, self._leaf = self._node_in_grad(), self._leaf + 1
        may_join = next_is_single and self._in_grad is None and self._leaf < self._schedule.nodes[-1][1]
        if may_join and self._stack.joins(node, self._leaf + 1) and self._is_plain():
            self._in_grad = node
            return False
        if self._in_grad is not None:
            self._refuse_parts()
            self._in_grad = None
        arrival = self._stack.push(node)
        self._note_used(self._put(arrival))
        for top in range(arrival.place, arrival.place - arrival.merges, -1):
            torch._foreach_add_(self._flats[top - 1], self._flats[top])
        return True

    def last_begins(self) -> None:
        """The last virtual worker's gradients are taken one by one, as they arrive; `last_taken` ends that."""
        self._last = self._stack.push(self._node_in_grad())
        self._room_for(self._last.place)

    @torch.no_grad()
    def take_of_last(self, position: int) -> None:
        """One parameter's gradient."""
        arrival, gradient = self._last, self._params[position].grad
        view = self.views[arrival.place][position]
        if gradient is None and not arrival.adds:
            view.fill_(-0.0)
        elif gradient is not None and arrival.adds:
            view.add_(dense(gradient))
        elif gradient is not None:
            copy_all([view], [gradient])
        for top in range(arrival.place, arrival.place - arrival.merges, -1):
            self.views[top - 1][position].add_(self.views[top][position])

    def last_taken(self) -> None:
        """Each parameter of the last virtual worker has been taken by itself."""
        self._note_used([param.grad is not None for param in self._params])

    def _is_plain(self) -> bool:
        """Whether autograd would add the next gradient to what stands in `.grad` as one number to another.

        It concatenates sparse ones. And a gradient that comes in several parts (torch.utils.checkpoint with
        use_reentrant=True) is added part by part: for each addition in place the version counts.
        """
        grads = [p.grad for p in self._params if p.grad is not None]
        return all(grad.layout is torch.strided and grad._version == 0 for grad in grads)

    def _refuse_parts(self) -> None:
        """TaskError if a gradient came whole for one virtual worker, and in parts for the next, onto the first."""
        for param in self._params:
            if param.grad is not None and param.grad._version > 1:
                raise TaskError(
                    f"a parameter of shape {tuple(param.shape)} got its gradient in several parts in one backward "
                    "pass and whole in another, as with torch.utils.checkpoint(use_reentrant=True) in one branch; "
                    "use_reentrant=False gives it whole"
                )

    def _node_in_grad(self) -> Node:
        return (self._in_grad[0] if self._in_grad else self._leaf, self._leaf + 1)

    def _put(self, arrival: Arrival) -> list[bool]:
        """What stands in `.grad`, where it belongs; which parameters have something there."""
        self._room_for(arrival.place)
        views = self.views[arrival.place]
        return add(views, self._params) if arrival.adds else collect(views, self._params)

    def _room_for(self, place: int) -> None:
        if place == len(self.views):
            device = self._params[0].device
            sizes = self._layout.sizes.items()
            self._add_buffer({dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes})

    def _add_buffer(self, buffers: Mapping[torch.dtype, torch.Tensor]) -> None:
        self.views.append(self._layout.views(buffers))
        self._flats.append([buffers[dtype][:size] for dtype, size in self._layout.sizes.items()])

    def _note_used(self, used: list[bool]) -> None:
        if self._is_first or used != self.used:
            self.used = used if self._is_first else [a or b for a, b in zip(self.used, used, strict=True)]
        self._is_first = False


def add(views: Sequence[torch.Tensor], params: Sequence[nn.Parameter]) -> list[bool]:
    """Adds each parameter's gradient to its view; which parameters have one."""
    grads = [p.grad for p in params]
    used = [grad is not None for grad in grads]
    if not all(used):
        views = [view for view, is_used in zip(views, used, strict=True) if is_used]
    if views:
        torch._foreach_add_(list(views), [dense(grad) for grad in grads if grad is not None])
    return used
