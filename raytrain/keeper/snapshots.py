"""A run's newest states in memory that outlives its processes: as the workers of a run see it, and fill it."""

from __future__ import annotations

import collections
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from raytrain.batch import tensors_of
from raytrain.engine.state import RunState, payload_of, size_to_come
from raytrain.keeper.client import KeeperClient
from raytrain.keeper.shared_memory import SLOTS, Slots
from raytrain.progress import Progress
from raytrain.storage.file_layout import FileBuffer, FileLayout, IrregularPayload, Leaves, leaves_of
from raytrain.storage.state_file import check_loadable, dumps, loads

HEAVY_S = 0.25  # a first copy that took as long is not done again right away


class TooSmall(Exception):  # noqa: N818 (nothing is wrong)
    """The slots cannot hold a state of size_bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class Snapshots:
    """The keeper's slots, as this process fills them with states of the run."""

    def __init__(self, keeper: KeeperClient) -> None:
        self._keeper = keeper
        self._layout: FileLayout | None = None
        self._buffers: dict[int, FileBuffer] = {}
        self._copy: SnapshotCopy | None = None

    def free_slot(self, used: set[int | None]) -> int | None:
        """One that is neither used, nor the newest, nor being filled, nor written by the keeper for a dead worker."""
        status = self._keeper.status
        taken = {*used, status.newest(), self._copy.slot if self._copy else None}
        return next((slot for slot in range(SLOTS) if slot not in taken and not status.is_read(slot)), None)

    def put(self, run: RunState, slot: int, finite: torch.Tensor) -> bool:
        """Begin to copy the run's state to this slot; `settle` makes it the newest once it has arrived, if `finite`.

        Whether it was the first of its shape there. TooSmall, and nothing is done: `make_room` comes first.
        """
        payload = payload_of(run)
        leaves = leaves_of(payload)
        on_gpu = run.world.device.type == "cuda"
        if self._layout is None or not self._layout.fits(leaves):
            self._buffers.clear()
            self._layout = layout_of(leaves)
        layout = self._layout
        data = dumps(payload) if layout is None else b""  # odd ones as a whole
        size_bytes = len(data) if layout is None else layout.size_bytes
        if self._keeper.slots is None or size_bytes > self._keeper.slots.slot_bytes:
            raise TooSmall(size_bytes)
        memory = self._keeper.slots.view(slot, size_bytes)
        self._keeper.status.begin(slot)
        self._copy = SnapshotCopy(slot, run.progress, size_bytes, finite)
        if layout is None:
            memory[:] = data
            self._copy.begin(run, lambda: None)
            return False
        is_new = slot not in self._buffers
        if is_new:
            self._keeper.slots.touch(slot * self._keeper.slots.slot_bytes, size_bytes)
            if on_gpu:
                pin(memory)
            self._buffers[slot] = layout.write_into(memory)
        if on_gpu:
            changing = run.engine.buffers.parameter_tensors().values()
            leaves = with_copies(leaves, [*run.model.buffers(), *changing, *tensors_of(payload["raytrain"]["own"])])
        self._copy.begin(run, functools.partial(self._buffers[slot].fill, leaves))
        if is_new:
            check_loadable(memory)
        return is_new

    def prepare(self, run: RunState) -> None:
        """Slots that will do for this run, unless a worker before has left some: the keeper fetches their memory."""
        if self._keeper.slots is None:
            self.make_room(size_to_come(run))

    def make_room(self, size_bytes: int) -> None:
        """Larger slots, for the keeper too; of what is in the old ones, the newest state moves along."""
        self._buffers.clear()
        status, newest, slots = self._keeper.status, self._keeper.status.newest(), Slots.made(size_bytes)
        if newest is not None and self._keeper.slots is not None:
            state = self._keeper.state(newest)
            slots.view(newest, len(state))[:] = state  # in the same slot: the table is right for old and new ones
        status.forget_all_but(newest)
        self._keeper.slots = slots
        self._keeper.channel.send(op="slots", slot_bytes=slots.slot_bytes)
        self._keeper.channel.send_descriptor(slots.descriptor)

    def settle(self, wait: bool) -> None:
        """What has arrived is the newest state, unless there is NaN in it; with `wait`, what is under way too."""
        copy = self._copy
        if copy is None or not copy.is_over(wait):
            return
        self._copy = None
        if copy.is_finite():
            self._keeper.status.commit(copy.slot, copy.progress, copy.size_bytes)


class Pace:
    """Every how many steps a state is copied to memory, so that it takes `share` of the time at most."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._costs_s = collections.deque([0.0, 0.0], maxlen=5)
        self._step_s = 0.0
        self._since, self._ended_at = 0, time.perf_counter()

    def is_due(self, every: Any) -> bool:
        """Ask once after each step. every: steps, "auto", or None for never."""
        now = time.perf_counter()
        step_s, self._ended_at = now - self._ended_at, now
        self._step_s = 0.9 * self._step_s + 0.1 * step_s if self._step_s else step_s
        self._since += 1
        if every == "auto":
            # Not the last one, nor the mean: one copy that a busy machine held up would put the next off by 100 steps.
            cost_s = statistics.median(self._costs_s)
            every = math.ceil(cost_s / (self._share * self._step_s))
        return every is not None and self._since >= every

    def begin_anew(self) -> None:
        """The state has just been copied, and the clock of the next step starts."""
        self._since, self._ended_at = 0, time.perf_counter()

    def took(self, cost_s: float, first: bool) -> None:
        """It was done, and took so long. The first in its place takes longer than others: all is laid out for it."""
        self.begin_anew()
        if first and cost_s > HEAVY_S and not any(self._costs_s):
            self._costs_s.clear()
        elif first:
            return
        self._costs_s.append(cost_s)


class SnapshotCopy:
    """One state on its way to a slot; from a GPU beside the computation, on a stream of its own."""

    def __init__(self, slot: int, progress: Progress, size_bytes: int, finite: torch.Tensor) -> None:
        self.slot, self.progress, self.size_bytes = slot, progress, size_bytes
        self._arrived: torch.cuda.Event | None = None
        self._finite = finite

    def begin(self, run: RunState, fill: Callable[[], None]) -> None:
        """`fill` is called, and what it launches on a GPU is waited for by the next optimizer step alone."""
        device = run.world.device
        if device.type != "cuda":
            fill()
            return
        stream = side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            fill()
            self._finite = self._finite.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)
        run.engine.readers_done = self._arrived

    def is_over(self, wait: bool) -> bool:
        if self._arrived is not None and wait:
            self._arrived.synchronize()
        return self._arrived is None or self._arrived.query()

    def is_finite(self) -> bool:
        return bool(self._finite)


def load_newest(keeper: KeeperClient) -> dict[str, Any]:
    """The payload of the newest state in memory."""
    slot = keeper.status.newest()
    assert slot is not None, "newest said that there is one"
    return loads(keeper.state(slot), "the state in memory")


def layout_of(leaves: Leaves) -> FileLayout | None:
    try:
        return FileLayout(leaves)
    except IrregularPayload:
        return None


def pin(memory: memoryview) -> None:
    """A GPU copies to this memory without the host; it may be pinned already."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostRegister(torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), len(memory), 0)


def with_copies(leaves: Leaves, of: Iterable[torch.Tensor]) -> Leaves:
    """With copies on the device of those tensors: the next forward pass changes them, and waits for nobody."""
    changing, tensors = {tensor.data_ptr() for tensor in of}, []
    for tensor in leaves.tensors:
        if tensor.data_ptr() in changing and tensor.is_cuda:
            tensor = tensor.clone()
            tensor.record_stream(side_stream(tensor.device))
        tensors.append(tensor)
    return leaves._replace(tensors=tensors)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
