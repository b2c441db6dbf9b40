"""How the processes of a run add up their gradients: through shared memory on one host, else by collectives.

Between two processes on one machine a gloo reduction takes a millisecond or more of waking and
copying; through memory that both have mapped it takes as long as adding. Measured on two cores, an
MLP of 20 tensors: several times the steps a second.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raytrain.engine.buffers import LINE, copy_fitting, fits, num_bytes, room_in, rounded
from raytrain.engine.world import World
from raytrain.errors import LostWorkerError, PreflightError
from raytrain.storage.processes import started_at

LOOKS, YIELDS = 50, 600  # at a peer's counter before others get this core, and how often before a nap: about 0.8 ms
NAP_S = (50e-6, 400e-6)  # the first one, and the longest
PEER_CHECK_S = 0.5  # how often, while waiting, it is seen whether the others live
PATIENCE_S = 1800.0  # as torch.distributed's own; what takes longer has gone wrong
PAGE = 4096


class Exchange:
    """One process alone: what it has is the sum.

    addends: by dtype, the flat buffer that this process fills after `open` and before `share`
    sums:    by dtype, where `share` leaves the sum over all processes, the same bits on each
    room:    where those tensors travel that shall be rank 0's; one that no longer fits stays as it last did
    """

    kind = "none"

    def __init__(self, sizes: Mapping[torch.dtype, int], world: World) -> None:
        self.world = world
        self.addends = {dtype: torch.zeros(size, dtype=dtype, device=world.device) for dtype, size in sizes.items()}
        self.sums = self.addends
        self.room: dict[Any, torch.Tensor] = {}

    def open(self) -> None:
        """From here on `addends` may be written."""

    def share(self, firsts: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Fill `sums`, and make each tensor of `firsts` that fits its `room` what it is on rank 0."""

    def moved(self, firsts: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Those of `firsts` that `share` leaves as they are."""
        return {key: first for key, first in firsts.items() if not fits(first, self.room.get(key))}


class Collective(Exchange):
    """By torch.distributed (gloo, NCCL), in place: one reduction a dtype, less what was started before."""

    kind = "collective"

    def __init__(self, sizes: Mapping[torch.dtype, int], firsts: Mapping[Any, torch.Tensor], world: World) -> None:
        super().__init__(sizes, world)
        self._packed = torch.zeros(num_bytes(firsts), dtype=torch.uint8, device=world.device)
        self.room = room_in(self._packed, firsts)
        copy_fitting(self.room, firsts)
        self._under_way: list[Any] = []
        self._started = dict.fromkeys(sizes, 0)

    def start(self, dtype: torch.dtype, start: int, stop: int) -> None:
        """Collective. Begin to sum that part of a buffer; `share` waits for it."""
        self._under_way.append(self.world.begin_sum(self.addends[dtype][start:stop]))
        self._started[dtype] = max(self._started[dtype], stop)

    def share(self, firsts: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Whatever lies behind the parts that were started is summed now."""
        for dtype, buffer in self.addends.items():
            rest = buffer[self._started[dtype] :]
            self._started[dtype] = 0
            if rest.numel():
                self.world.sum_(rest)
        if self.room:
            copy_fitting(self.room, firsts)
            self.world.broadcast_(self._packed)
            if not self.world.is_first:
                copy_fitting(firsts, self.room)
        for work in self._under_way:
            work.wait()
        self._under_way.clear()


class SharedMemory(Exchange):
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
        firsts: Mapping[Any, torch.Tensor],
        world: World,
        fence: Callable[[], None],
    ) -> None:
        self.world, self._fence = world, fence
        self._turn = 0
        self.sums = {dtype: torch.zeros(size, dtype=dtype) for dtype, size in sizes.items()}
        slot_bytes = sum(rounded(size * dtype.itemsize, PAGE) for dtype, size in sizes.items())
        header_bytes = rounded(world.size * 2 * LINE, PAGE)
        total_bytes = header_bytes + world.size * slot_bytes + rounded(num_bytes(firsts), PAGE)
        self._memory = memory_of_all(world, total_bytes)
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
                slot[dtype] = self._view(at, dtype, size)
                at += rounded(size * dtype.itemsize, PAGE)
            self._slots.append(slot)
        self.addends = self._slots[world.rank]
        self.room = room_in(self._view(at, torch.uint8, num_bytes(firsts)), firsts)
        if world.is_first:
            copy_fitting(self.room, firsts)

    def open(self) -> None:
        """Wait until everyone has read what this process shared last; a whole step ago, so hardly ever."""
        self._wait(self._read)
        self._fence()

    def share(self, firsts: Mapping[Any, torch.Tensor]) -> None:
        if self.world.is_first:
            copy_fitting(self.room, firsts)
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
            copy_fitting(firsts, self.room)
        self._fence()
        self._read[self.world.rank][0] = self._turn

    def _view(self, at: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        if count == 0:  # which frombuffer refuses
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=at)

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
            if now - began > PATIENCE_S:
                raise LostWorkerError(
                    f"rank {rank} (process {self._pids[rank][0]}) lives, but has not come to the end of this step for "
                    f"{PATIENCE_S / 60:.0f} minutes, while rank {self.world.rank} waited; "
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


def open_exchange(
    sizes: Mapping[torch.dtype, int], firsts: Mapping[Any, torch.Tensor], world: World, reduction: str
) -> Exchange:
    """Collective. The fastest exchange that holds here; SCALE.REDUCTION may insist on one.

    sizes:  elements by dtype of the flat buffers
    firsts: by key, tensors like those that `share` will be given
    """
    if world.size == 1:
        return Exchange(sizes, world)
    if reduction == "collective":
        return Collective(sizes, firsts, world)
    reason = why_not_shared(world)
    if reason is None:
        fence = memory_fence()
        assert fence is not None, "why_not_shared has looked"
        return SharedMemory(sizes, firsts, world, fence)
    if reduction == "shared_memory":
        raise PreflightError(f"SCALE.REDUCTION is shared_memory, but {reason}; set it to auto")
    return Collective(sizes, firsts, world)


def why_not_shared(world: World) -> str | None:
    """Collective. What keeps the processes from sharing memory, the same on each; None if nothing does."""
    if world.device.type != "cpu":
        return f"gradients are on the {world.device.type} device"
    reason = None
    if not hasattr(os, "memfd_create"):
        reason = "this system has no memfd_create"
    elif memory_fence() is None:
        reason = f"{platform.machine()} needs a memory fence and libatomic.so.1 is not here"
    offer = None
    if world.is_first and reason is None:
        token = secrets.token_bytes(16)
        with open(os.memfd_create("raytrain-probe"), "w+b") as file:
            file.write(token)
            file.flush()
            offer = world.broadcast_object((os.getpid(), file.fileno(), token))
            seen = world.all_objects(True)
    else:
        offer = world.broadcast_object(None)
        seen = world.all_objects(reason is None and offer is not None and sees(*offer))
    if all(seen):
        return None
    return reason or "the workers are not all on one host, or may not look into each other's /proc"


def sees(pid: int, descriptor: int, token: bytes) -> bool:
    try:
        return Path(f"/proc/{pid}/fd/{descriptor}").read_bytes() == token
    except OSError:
        return False


def memory_of_all(world: World, size_bytes: int) -> mmap.mmap:
    """Collective. Zeroed memory that all processes of this host have mapped."""
    if world.is_first:
        descriptor = os.memfd_create("raytrain-exchange")
        os.ftruncate(descriptor, size_bytes)
        world.broadcast_object((os.getpid(), descriptor))
    else:
        pid, theirs = world.broadcast_object(None)
        descriptor = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
    memory = mmap.mmap(descriptor, size_bytes)
    world.all_objects(None)  # rank 0 keeps its descriptor until everyone has opened it
    os.close(descriptor)
    return memory


def memory_fence() -> Callable[[], None] | None:
    """What keeps stores before it before stores after it, loads likewise; None where there is none.

    x86 orders both by itself. Elsewhere C11's fence, which every Linux has in libatomic.
    """
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        return lambda: None
    return libatomic_fence()


def libatomic_fence() -> Callable[[], None] | None:
    sequentially_consistent = 5
    try:
        fence: Any = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    return lambda: fence(sequentially_consistent)


def num_cpus() -> int:
    """The cores that this process may use: its affinity, and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed
