"""How the processes of one host add up their gradients: through memory that all have mapped.

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

from raytrain.engine.buffers import copy_fitting
from raytrain.engine.mapped_memory import mapped_by_all, num_cpus
from raytrain.engine.reduction import LINE, Reduction, rounded, staging_bytes, staging_in, zeros
from raytrain.engine.tree import Additions, add_up
from raytrain.engine.world import World
from raytrain.errors import LostWorkerError
from raytrain.storage.processes import started_at

LOOKS, YIELDS = 50, 600  # at a peer's counter before others get this core, and how often before a nap: about 0.8 ms
NAP_S = (50e-6, 400e-6)  # the first one, and the longest
PEER_CHECK_S = 0.5  # how often, while waiting, it is seen whether the others live
STUCK_S = 1800.0  # as torch.distributed's own; what takes longer has gone wrong
PAGE = 4096
SHARED_BYTES = 2**18  # of gradients, below which a second wait takes longer than adding up all slots


class SharedMemoryReduction(Reduction):
    """Through a file without a name that all processes of this host have mapped.

    Each process has a slot for each of its nodes and two counters: how often it has filled its slots, and
    how often it has read what it reads of all slots. Each counter has a cache line of its own, or neighbours slow each
    other down. Where there are many slots, each process adds up its share of the numbers into memory that all
    then read; where there are few, everyone adds up all. Nothing is in
    /dev/shm: the memory is gone with the last process, however that ends.
    """

    kind = "shared memory"

    def __init__(
        self,
        sizes: Mapping[torch.dtype, int],
        buffers: Mapping[Any, torch.Tensor],
        world: World,
        additions: Additions,
        fence: Callable[[], None],
    ) -> None:
        self.world, self._additions, self._fence = world, additions, fence
        self._turn = 0
        self.sums = zeros(sizes, world.device)
        slot_bytes = sum(rounded(size * dtype.itemsize, PAGE) for dtype, size in sizes.items())
        header_bytes = rounded(world.size * 2 * LINE, PAGE)
        num_slots = sum(additions.counts)
        self._shares_work = shares_work(num_slots, world.size, slot_bytes)
        self._memory = mapped_by_all(world, header_bytes + (num_slots + self._shares_work) * slot_bytes)
        words = memoryview(self._memory).cast("q")
        step = LINE // 8
        self._filled = [words[2 * step * r :][:1] for r in range(world.size)]
        self._read = [words[2 * step * r + step :][:1] for r in range(world.size)]
        self._pids = world.all_objects((os.getpid(), started_at(os.getpid())))
        self._others = [r for r in range(world.size) if r != world.rank]
        self._spins = world.size <= num_cpus()
        places = [header_bytes + slot * slot_bytes for slot in range(num_slots + self._shares_work)]
        self._slots = [flat_buffers_in(self._memory, place, sizes) for place in places]
        self._result = self._slots.pop() if self._shares_work else {}
        first = sum(additions.counts[: world.rank])
        self.nodes = self._slots[first : first + additions.counts[world.rank]]
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
        for dtype, total in self._result.items() if self._shares_work else self.sums.items():
            part = share_of(len(total), self.world) if self._shares_work else slice(None)
            add_up([slot[dtype][part] for slot in self._slots], self._additions.across.arrivals, total[part])
        if not self.world.is_first:
            copy_fitting(buffers, self.staging)
        self._fence()
        self._read[self.world.rank][0] = self._turn
        if self._shares_work:
            self._wait(self._read)
            self._fence()
            for dtype, total in self.sums.items():
                total.copy_(self._result[dtype])

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


def shares_work(num_slots: int, processes: int, slot_bytes: int) -> bool:
    """Whether adding up a share and reading the sums is less traffic than adding up all slots, and worth a wait."""
    alone, shared = num_slots + 1, (num_slots + 1) / processes + 2
    return slot_bytes >= SHARED_BYTES and shared < alone


def share_of(size: int, world: World) -> slice:
    """Of so many numbers, those that this process adds up."""
    each = rounded(-(-size // world.size), LINE // 4)
    return slice(min(size, world.rank * each), min(size, (world.rank + 1) * each))


def flat_buffers_in(memory: Any, at: int, sizes: Mapping[torch.dtype, int]) -> dict[torch.dtype, torch.Tensor]:
    """A flat buffer for each of `sizes` in `memory`, from byte `at` on; each begins on a page."""
    buffers = {}
    for dtype, size in sizes.items():
        buffers[dtype] = view_of(memory, at, dtype, size)
        at += rounded(size * dtype.itemsize, PAGE)
    return buffers


def view_of(memory: Any, at: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """`count` numbers in `memory` from byte `at` on."""
    if count == 0:  # which frombuffer refuses
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=at)
