"""The gradients of a step, from `.grad` of each process to their sum over all of them, in one reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from raytrain.engine.buffers import ModuleBuffers
from raytrain.engine.collectives import CollectiveReduction, OrderedReduction, padded
from raytrain.engine.layout import Layout
from raytrain.engine.leaves import Leaves
from raytrain.engine.mapped_memory import memory_fence, why_not_mapped
from raytrain.engine.overlap import Overlap
from raytrain.engine.recorded import Terms
from raytrain.engine.reduction import Reduction
from raytrain.engine.shared_memory import SharedMemoryReduction
from raytrain.engine.tail import Combined, LeafLoss, Tail, with_tail
from raytrain.engine.terms import Key, Sum, means_of, together
from raytrain.engine.tree import Additions, additions, of_processes
from raytrain.engine.world import World
from raytrain.errors import PreflightError


class Gradients:
    """Copies the gradients into one flat buffer per dtype, and sums them over the virtual workers of all processes.

    is_exact: whether each virtual worker is a leaf of the tree (engine/tree.py); else each process is one, in which
              autograd has added up
    layout:   where each parameter's gradient lies in the buffers of `reduction`
    overlap:  where gradients travel by collectives and are large: sums parts of them while backward runs
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        buffers: ModuleBuffers,
        world: World,
        reduction: str,
        is_exact: bool,
        segment_bytes: int,
    ) -> None:
        """Collective. `reduction` is SCALE.REDUCTION; larger gradients than segment_bytes are summed in parts."""
        self.params, self.buffers, self.world, self.is_exact = params, buffers, world, is_exact
        self.layout = Layout(params)
        sizes = padded(with_tail(self.layout.sizes, len(params), buffers.means), world)
        adds = (
            additions(world.rank, world.size, world.virtual_workers)
            if is_exact
            else of_processes(world.rank, world.size)
        )
        self.reduction = open_reduction(sizes, buffers.tensors(), world, reduction, adds, is_exact)
        self.tail = Tail(params, self.reduction, adds.here, buffers.means)
        self.terms = Terms(self.tail, world, adds)
        self._leaves = Leaves(params, self.layout, adds.here, self.reduction.nodes)
        self._in_grad: list[torch.Tensor | None] = []
        self.overlap: Overlap | None = None
        size_bytes = sum(size * dtype.itemsize for dtype, size in self.layout.sizes.items())
        if isinstance(self.reduction, CollectiveReduction) and size_bytes > segment_bytes:
            self.overlap = Overlap(model, params, self.layout, self._leaves, self.reduction, segment_bytes)

    def begin_step(self) -> None:
        """No virtual worker has come yet."""
        self._leaves.begin_step()

    def sums(self) -> list[torch.Tensor]:
        """Each parameter's part of the sum, where `combine` leaves it."""
        return self.layout.views(self.reduction.sums)

    def here(self) -> list[list[torch.Tensor | None]]:
        """Of each parameter, what this process computed in the step that was combined last; on a CPU."""
        if not self.is_exact:
            return [[grad] for grad in self._in_grad]
        return [list(nodes) for nodes in zip(*self._leaves.views[: len(self.reduction.nodes)], strict=True)]

    def last_backward_begins(self) -> None:
        """No other backward pass follows before `combine`, so gradients may travel as they arrive."""
        if self.overlap is not None:
            self.reduction.open()
            self.overlap.arm()

    def leaf_done(self, next_is_single: bool) -> bool:
        """A virtual worker (of one that is not exact: this process) is through; its gradient stands in `.grad`.

        next_is_single: the one that follows has one backward pass, so that autograd may add it where the tree would
        Returns whether what stands in `.grad` was taken, and the next one begins without.
        """
        if self.overlap is not None and self.overlap.armed:
            self.overlap.finish()
            return True
        self.reduction.open()
        return self._leaves.leaf_done(next_is_single)

    def combine(
        self, losses: Sequence[LeafLoss], wishes: tuple[bool, ...], terms: Sequence[Mapping[Key, Sum]] | None
    ) -> Combined:
        """Collective. Sum the gradients, and what rides in their tail; its buffers become rank 0's, or the mean.

        losses, terms: of each virtual worker here
        """
        self._in_grad = [] if self.is_exact else [param.grad for param in self.params]
        self.tail.write_means()
        if self.world.size == 1:
            self.tail.read_means(self.world.virtual_workers)
            return self._combined_alone(losses, wishes, terms)
        buffers = self.buffers.tensors()
        unstaged = self.reduction.unstaged(buffers) if self.world.is_first else {}
        if terms is not None and not self.is_exact:
            terms = [together(terms)]
        has_new_term = self.terms.write(terms)
        self.tail.write(self._leaves.used, (*wishes, has_new_term, bool(unstaged)), losses)
        self.reduction.reduce(buffers)
        summed = self.tail.read(len(wishes) + 2)
        if summed.wishes[-2]:
            self.terms.new_name_met()
        if summed.wishes[-1] and self.world.device.type == "cpu":  # a GPU would learn of it too late
            self.buffers.take_over(self.world.broadcast_object(unstaged))
        self.tail.read_means(self.world.virtual_workers)
        means = None if terms is None else self.terms.read()
        weight = None if losses[0].weight is None else summed.weight
        return summed._replace(wishes=summed.wishes[:-2], weight=weight, terms=means)

    def _combined_alone(
        self, losses: Sequence[LeafLoss], wishes: tuple[bool, ...], terms: Sequence[Mapping[Key, Sum]] | None
    ) -> Combined:
        """Of one process: to the bits that several would come to."""
        (whole,) = self.tail.of_nodes(losses)
        means = None
        if terms is not None and len(losses) == 1:
            means = means_of(terms)
        elif terms is not None:
            self.terms.write(terms)
            means = self.terms.read()
        return Combined(self._leaves.used, wishes, *whole, terms=means)


def open_reduction(
    sizes: Mapping[torch.dtype, int],
    buffers: Mapping[Any, torch.Tensor],
    world: World,
    reduction: str,
    adds: Additions,
    is_exact: bool,
) -> Reduction:
    """Collective. The fastest reduction that holds here; SCALE.REDUCTION may insist on one.

    sizes:    elements by dtype of the flat buffers
    buffers:  by key, tensors like those that `reduce` will be given
    is_exact: whether nodes are added as `adds` says; else a collective may add as it likes
    """
    if world.size == 1:
        return Reduction(sizes, world)
    reason = "SCALE.REDUCTION is collective" if reduction == "collective" else why_not_mapped(world)
    if reason is None:
        fence = memory_fence()
        assert fence is not None, "why_not_mapped has looked"
        return SharedMemoryReduction(sizes, buffers, world, adds, fence)
    if reduction == "shared_memory":
        raise PreflightError(f"SCALE.REDUCTION is shared_memory, but {reason}; set it to auto")
    if is_exact:
        return OrderedReduction(sizes, buffers, world, adds)
    return CollectiveReduction(sizes, buffers, world)
