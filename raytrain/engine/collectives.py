"""How processes on several hosts, or with GPUs, add up their gradients: by torch.distributed (gloo, NCCL)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from raytrain.engine.buffers import copy_fitting
from raytrain.engine.reduction import Reduction, rounded, staging_bytes, staging_in, zeros
from raytrain.engine.tree import Additions, add_up
from raytrain.engine.world import World

ALIGN = 16  # elements: what each process adds up of a segment begins on a vector
SMALL_BYTES = 2**16  # of gradients, below which one message more takes longer than the bytes that it saves


class CollectiveReduction(Reduction):
    """In place, in whatever order the library adds: one reduction a dtype, less what was started before."""

    kind = "collective"

    def __init__(
        self, sizes: Mapping[torch.dtype, int], buffers: Mapping[Any, torch.Tensor], world: World, num_nodes: int = 1
    ) -> None:
        super().__init__(sizes, world, num_nodes)
        self.stage(buffers)
        self._under_way: list[Any] = []
        self._started = dict.fromkeys(sizes, 0)

    def stage(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        self._staging_memory = torch.zeros(staging_bytes(buffers), dtype=torch.uint8, device=self.world.device)
        self.staging = staging_in(self._staging_memory, buffers)
        copy_fitting(self.staging, buffers)

    def start(self, dtype: torch.dtype, start: int, stop: int) -> None:
        """Collective. Begin to sum that part of a flat buffer; `reduce` waits for it."""
        self._started[dtype] = max(self._started[dtype], stop)
        self._begin_sum(dtype, start, stop)

    def reduce(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Whatever lies behind the parts that were started is summed now."""
        for dtype, total in self.sums.items():
            if self._started[dtype] < len(total):
                self._begin_sum(dtype, self._started[dtype], len(total))
            self._started[dtype] = 0
        if self.staging:
            copy_fitting(self.staging, buffers)
            self.world.broadcast_(self._staging_memory)
            if not self.world.is_first:
                copy_fitting(buffers, self.staging)
        self._finish()

    def _begin_sum(self, dtype: torch.dtype, start: int, stop: int) -> None:
        self._under_way.append(self.world.begin_sum(self.sums[dtype][start:stop]))

    def _finish(self) -> None:
        """Wait for all sums that have begun."""
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


class Exchange(NamedTuple):
    """A segment whose parts are on their way to the processes that add them up."""

    dtype: torch.dtype
    start: int
    stop: int
    received: torch.Tensor
    work: Any


class OrderedReduction(CollectiveReduction):
    """In the order of the tree, with the bytes of a ring.

    Each process gets its share of a segment from all others, adds up in the tree's order, and sends the sum to all. The
    ring's all-reduce moves as many bytes, but adds in an order that depends on the number of processes. A process with
    several nodes sends each.
    """

    kind = "ordered collective"

    def __init__(
        self,
        sizes: Mapping[torch.dtype, int],
        buffers: Mapping[Any, torch.Tensor],
        world: World,
        additions: Additions,
    ) -> None:
        """sizes: multiples of `whole(world)`"""
        super().__init__(sizes, buffers, world, additions.counts[world.rank])
        self._additions = additions
        self._exchanges: deque[Exchange] = deque()
        self._side = None
        if world.device.type == "cpu":
            self.sums = zeros(sizes, world.device)  # a bad step's culprits are looked for in the nodes
        else:
            self._side = torch.cuda.Stream(world.device)

    def _begin_sum(self, dtype: torch.dtype, start: int, stop: int) -> None:
        if (stop - start) * dtype.itemsize <= SMALL_BYTES:
            self._gather_whole(dtype, start, stop)
        elif self._side is None:
            while self._exchanges:  # one is under way while backward makes the next: in this order on every process
                self._add_up_oldest()
            self._exchange(dtype, start, stop)
        else:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self._exchange(dtype, start, stop)
                self._add_up_oldest()

    def _finish(self) -> None:
        while self._exchanges:
            self._add_up_oldest()
        super()._finish()
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _exchange(self, dtype: torch.dtype, start: int, stop: int) -> None:
        """Begin to send each process its share of all nodes here."""
        share, counts = (stop - start) // self.world.size, self._additions.counts
        received = torch.empty(sum(counts) * share, dtype=dtype, device=self.world.device)
        parts = [node[dtype][start:stop].view(self.world.size, share) for node in self.nodes]
        sent = parts[0].reshape(-1) if len(parts) == 1 else torch.stack(parts, dim=1).reshape(-1)
        work = self.world.begin_exchange(received, sent, [count * share for count in counts])
        self._exchanges.append(Exchange(dtype, start, stop, received, work))

    def _add_up_oldest(self) -> None:
        """Add up this process's share of a segment, and begin to send the sum to all."""
        dtype, start, stop, received, work = self._exchanges.popleft()
        work.wait()
        share = (stop - start) // self.world.size
        sums = self.sums[dtype][start:stop]
        total = torch.empty(share, dtype=dtype, device=self.world.device)
        add_up(received.split(share), self._additions.across.arrivals, total)
        self._under_way.append(self.world.begin_gather(sums, total))

    def _gather_whole(self, dtype: torch.dtype, start: int, stop: int) -> None:
        """Every process adds up all that the others send it: twice the bytes or more, in one message."""
        parts = nodes_of_all([node[dtype][start:stop] for node in self.nodes], self._additions.counts, self.world)
        add_up(parts, self._additions.across.arrivals, self.sums[dtype][start:stop])


def nodes_of_all(nodes: Sequence[torch.Tensor], counts: Sequence[int], world: World) -> list[torch.Tensor]:
    """Collective. The nodes of all processes in the order of ranks, of which each has as many as `counts` says."""
    most, size = max(counts), len(nodes[0])
    sent = torch.stack([nodes[min(i, len(nodes) - 1)] for i in range(most)]).view(-1)
    received = sent.new_empty(len(counts) * len(sent))
    world.gather_(received, sent)
    by_rank = received.view(len(counts), most, size)
    return [by_rank[rank, i] for rank, count in enumerate(counts) for i in range(count)]


def whole(world: World) -> int:
    """Segments of a flat buffer are multiples of so many elements: as large a share for each process."""
    return world.size * ALIGN


def padded(sizes: Mapping[torch.dtype, int], world: World) -> dict[torch.dtype, int]:
    """`sizes`, each rounded up to segments."""
    return {dtype: rounded(size, whole(world)) for dtype, size in sizes.items()}
