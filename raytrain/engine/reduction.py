"""How the processes of a run add up their gradients: through shared memory on one host, else by collectives.

Between two processes on one machine a gloo reduction takes a millisecond or more of waking and
copying; through memory that both have mapped it takes as long as adding. Measured on two cores, an
MLP of 20 tensors: several times the steps a second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raytrain.engine.buffers import copy_fitting, fits
from raytrain.engine.mapped_memory import mapped_by_all, memory_fence, num_cpus, why_not_mapped
from raytrain.engine.world import World
from raytrain.errors import LostWorkerError, PreflightError
from raytrain.storage.processes import started_at

LOOKS, YIELDS = 50, 600  # at a peer's counter before others get this core, and how often before a nap: about 0.8 ms
NAP_S = (50e-6, 400e-6)  # the first one, and the longest
PEER_CHECK_S = 0.5  # how often, while waiting, it is seen whether the others live
STUCK_S = 1800.0  # as torch.distributed's own; what takes longer has gone wrong
PAGE = 4096
LINE = 64  # bytes: counters, and tensors in staging, begin on a cache line


class Reduction:
    """One process alone: what it has is the sum.

    addends: by dtype, the flat buffer that this process fills after `open` and before `reduce`
    sums:    by dtype, where `reduce` leaves the sum over all processes, the same bits on each
    staging: where a model's buffers travel, which shall be rank 0's; one that no longer fits stays as it last did

    A module may put a tensor of another shape in a buffer's place, or add one, and not alike on every rank: a cache as
    long as the longest sequence so far. So staging is laid out once, by what was there when training began, and each
    process takes of it what fits what it has now.
    """

    kind = "none"

    def __init__(self, sizes: Mapping[torch.dtype, int], world: World) -> None:
        self.world = world
        self.addends = {dtype: torch.zeros(size, dtype=dtype, device=world.device) for dtype, size in sizes.items()}
        self.sums = self.addends
        self.staging: dict[Any, torch.Tensor] = {}

    def stage(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Have a place in staging for each of `buffers`, with what it is on rank 0, and for no others."""

    def open(self) -> None:
        """From here on `addends` may be written."""

    def reduce(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Fill `sums`, and make each of `buffers` that fits its staging what it is on rank 0."""

    def unstaged(self, buffers: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Those of `buffers` that `reduce` leaves as they are."""
        return {key: buffer for key, buffer in buffers.items() if not fits(buffer, self.staging.get(key))}


class CollectiveReduction(Reduction):
    """By torch.distributed (gloo, NCCL), in place: one reduction a dtype, less what was started before."""

    kind = "collective"

    def __init__(self, sizes: Mapping[torch.dtype, int], buffers: Mapping[Any, torch.Tensor], world: World) -> None:
        super().__init__(sizes, world)
        self.stage(buffers)
        self._under_way: list[Any] = []
        self._started = dict.fromkeys(sizes, 0)

    def stage(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        self._staging_memory = torch.zeros(staging_bytes(buffers), dtype=torch.uint8, device=self.world.device)
        self.staging = staging_in(self._staging_memory, buffers)
        copy_fitting(self.staging, buffers)

    def start(self, dtype: torch.dtype, start: int, stop: int) -> None:
        """Collective. Begin to sum that part of a flat buffer; `reduce` waits for it."""
        self._under_way.append(self.world.begin_sum(self.addends[dtype][start:stop]))
        self._started[dtype] = max(self._started[dtype], stop)

    def reduce(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Whatever lies behind the parts that were started is summed now."""
        for dtype, addends in self.addends.items():
            rest = addends[self._started[dtype] :]
            self._started[dtype] = 0
            if rest.numel():
                self.world.sum_(rest)
        if self.staging:
            copy_fitting(self.staging, buffers)
            self.world.broadcast_(self._staging_memory)
            if not self.world.is_first:
                copy_fitting(buffers, self.staging)
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


class SharedMemoryReduction(Reduction):
    """Through a file without a name that all processes of this host have mapped.

    Each process has a slot for what it adds and two counters: how often it has filled its slot, and
    how often it has read all slots. Each counter has a cache line of its own, or neighbours slow each
    other down. Everyone adds all slots in the order of ranks. Nothing is in
    /dev/shm: the memory is gone with the last process, however that ends.
    """

    kind = "shared memory"

    def __init__(
        self,
        sizes: Mapping[torch.dtype, int],
        buffers: Mapping[Any, torch.Tensor],
        world: World,
        fence: Callable[[], None],
    ) -> None:
        self.world, self._fence = world, fence
        self._turn = 0
        self.sums = {dtype: torch.zeros(size, dtype=dtype) for dtype, size in sizes.items()}
        slot_bytes = sum(rounded(size * dtype.itemsize, PAGE) for dtype, size in sizes.items())
        header_bytes = rounded(world.size * 2 * LINE, PAGE)
        self._memory = mapped_by_all(world, header_bytes + world.size * slot_bytes)
        words = memoryview(self._memory).cast("q")
        step = LINE // 8
        self._filled = [words[2 * step * r :][:1] for r in range(world.size)]
        self._read = [words[2 * step * r + step :][:1] for r in range(world.size)]
        self._pids = world.all_objects((os.getpid(), started_at(os.getpid())))
        self._others = [r for r in range(world.size) if r != world.rank]
        self._spins = world.size <= num_cpus()
        self._slots: list[dict[torch.dtype, torch.Tensor]] = []
        at = header_bytes
        for _ in range(world.size):
            slot = {}
            for dtype, size in sizes.items():
                slot[dtype] = view_of(self._memory, at, dtype, size)
                at += rounded(size * dtype.itemsize, PAGE)
            self._slots.append(slot)
        self.addends = self._slots[world.rank]
        self.stage(buffers)

    def stage(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. In memory of its own."""
        size_bytes = staging_bytes(buffers)
        self._staging_memory = mapped_by_all(self.world, rounded(size_bytes, PAGE)) if size_bytes else None
        memory = view_of(self._staging_memory, 0, torch.uint8, size_bytes)
        self.staging = staging_in(memory, buffers)
        if self.world.is_first:
            copy_fitting(self.staging, buffers)

    def open(self) -> None:
        """Wait until everyone has read what this process added last; a whole step ago, so hardly ever."""
        self._wait(self._read)
        self._fence()

    def reduce(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        if self.world.is_first:
            copy_fitting(self.staging, buffers)
        self._turn += 1
        self._fence()
        self._filled[self.world.rank][0] = self._turn
        self._wait(self._filled)
        self._fence()
        for dtype, total in self.sums.items():
            first, second, *rest = (slot[dtype] for slot in self._slots)
            torch.add(first, second, out=total)
            for slot in rest:
                total.add_(slot)
        if not self.world.is_first:
            copy_fitting(buffers, self.staging)
        self._fence()
        self._read[self.world.rank][0] = self._turn

    def _wait(self, counters: Sequence[memoryview]) -> None:
        """Until every other process's counter has come to this turn: look, then nap, and see that they live."""
        for rank in self._others:
            if not self._comes_soon(counters[rank]):
                self._nap_until(counters, rank)

    def _comes_soon(self, counter: memoryview) -> bool:
        """Whether it comes to this turn while it is looked at; a nap of 0.1 ms costs 0.2."""
        turn = self._turn
        for _ in range(YIELDS if self._spins else 1):
            for _ in range(LOOKS):
                if counter[0] >= turn:
                    return True
            os.sched_yield()  # a loader worker, the journal's thread
        return False

    def _nap_until(self, counters: Sequence[memoryview], rank: int) -> None:
        nap_s, longest_s = NAP_S
        began = checked = time.monotonic()
        while counters[rank][0] < self._turn:
            time.sleep(nap_s)
            nap_s = min(2 * nap_s, longest_s)
            now = time.monotonic()
            if now - checked < PEER_CHECK_S:
                continue
            checked = now
            self._check_peers(counters)
            if now - began > STUCK_S:
                raise LostWorkerError(
                    f"rank {rank} (process {self._pids[rank][0]}) lives, but has not come to the end of this step for "
                    f"{STUCK_S / 60:.0f} minutes, while rank {self.world.rank} waited; "
                    "py-spy dump --pid shows what it does"
                )

    def _check_peers(self, counters: Sequence[memoryview]) -> None:
        for rank in self._others:
            pid, started = self._pids[rank]
            if started_at(pid) != started and counters[rank][0] < self._turn:
                raise LostWorkerError(
                    f"rank {rank} (process {pid}) has died; rank {self.world.rank} waited for its gradients. "
                    "The same command goes on from the newest checkpoint"
                )


def open_reduction(
    sizes: Mapping[torch.dtype, int], buffers: Mapping[Any, torch.Tensor], world: World, reduction: str
) -> Reduction:
    """Collective. The fastest reduction that holds here; SCALE.REDUCTION may insist on one.

    sizes:   elements by dtype of the flat buffers
    buffers: by key, tensors like those that `reduce` will be given
    """
    if world.size == 1:
        return Reduction(sizes, world)
    if reduction == "collective":
        return CollectiveReduction(sizes, buffers, world)
    reason = why_not_mapped(world)
    if reason is None:
        fence = memory_fence()
        assert fence is not None, "why_not_mapped has looked"
        return SharedMemoryReduction(sizes, buffers, world, fence)
    if reduction == "shared_memory":
        raise PreflightError(f"SCALE.REDUCTION is shared_memory, but {reason}; set it to auto")
    return CollectiveReduction(sizes, buffers, world)


def view_of(memory: Any, at: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """`count` numbers in `memory` from byte `at` on."""
    if count == 0:  # which frombuffer refuses
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=at)


def staging_bytes(buffers: Mapping[Any, torch.Tensor]) -> int:
    """That `staging_in` takes for them."""
    return sum(rounded(buffer.numel() * buffer.element_size(), LINE) for buffer in buffers.values())


def staging_in(memory: torch.Tensor, buffers: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """A tensor like each of `buffers`, all of them in `memory` (bytes)."""
    staging, at = {}, 0
    for key, buffer in buffers.items():
        size = buffer.numel() * buffer.element_size()
        staging[key] = memory[at : at + size].view(buffer.dtype).view(buffer.shape)
        at += rounded(size, LINE)
    return staging


def rounded(size: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to
