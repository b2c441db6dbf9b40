"""A run's newest states in memory that outlives its processes: as the workers of a run see it, and fill it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from raytrain.engine.state import RunState, payload_of, size_to_come
from raytrain.keeper.client import KeeperClient
from raytrain.keeper.shared_memory import SLOTS, Slots
from raytrain.progress import Progress
from raytrain.storage.file_layout import FileBuffer, FileLayout, IrregularPayload, Leaves, leaves_of
from raytrain.storage.state_file import check_loadable, dumps, loads


class TooSmall(Exception):  # noqa: N818 (nothing is wrong)
    """The slots cannot hold a state of size_bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class Snapshots:
    """The keeper's slots, as this process fills them with states of the run."""

    def __init__(self, kept: KeeperClient) -> None:
        self._kept = kept
        self._layout: FileLayout | None = None
        self._buffers: dict[int, FileBuffer] = {}
        self._transfer: Transfer | None = None

    def free_slot(self, used: set[int | None]) -> int | None:
        """One that is neither used, nor the newest, nor being filled, nor written by the keeper for a dead worker."""
        status = self._kept.status
        taken = {*used, status.newest(), self._transfer.slot if self._transfer else None}
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
        if self._kept.slots is None or size_bytes > self._kept.slots.slot_bytes:
            raise TooSmall(size_bytes)
        memory = self._kept.slots.view(slot, size_bytes)
        self._kept.status.begin(slot)
        self._transfer = Transfer(slot, run.progress, size_bytes, finite)
        if layout is None:
            memory[:] = data
            self._transfer.begin(run, lambda: None)
            return False
        is_new = slot not in self._buffers
        if is_new:
            self._kept.slots.touch(slot * self._kept.slots.slot_bytes, size_bytes)
            if on_gpu:
                pin(memory)
            self._buffers[slot] = layout.write_into(memory)
        if on_gpu:
            leaves = without_buffers(leaves, run)
        self._transfer.begin(run, functools.partial(self._buffers[slot].fill, leaves))
        if is_new:
            check_loadable(memory)
        return is_new

    def prepare(self, run: RunState) -> None:
        """Slots that will do for this run, unless a worker before has left some: the keeper fetches their memory."""
        if self._kept.slots is None:
            self.make_room(size_to_come(run))

    def make_room(self, size_bytes: int) -> None:
        """Larger slots, for the keeper too; of what is in the old ones, the newest state moves along."""
        self._buffers.clear()
        status, newest, slots = self._kept.status, self._kept.status.newest(), Slots.made(size_bytes)
        if newest is not None and self._kept.slots is not None:
            state = self._kept.state(newest)
            slots.view(newest, len(state))[:] = state  # in the same slot: the table is right for old and new ones
        status.forget_all_but(newest)
        self._kept.slots = slots
        self._kept.channel.send(op="slots", slot_bytes=slots.slot_bytes)
        self._kept.channel.send_descriptor(slots.descriptor)

    def settle(self, wait: bool) -> None:
        """What has arrived is the newest state, unless there is NaN in it; with `wait`, what is under way too."""
        transfer = self._transfer
        if transfer is None or not transfer.is_over(wait):
            return
        self._transfer = None
        if transfer.is_finite():
            self._kept.status.commit(transfer.slot, transfer.progress, transfer.size_bytes)


class Transfer:
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


def without_buffers(leaves: Leaves, run: RunState) -> Leaves:
    """With copies on the device of the model's buffers: the next forward pass changes those, and waits for nobody."""
    buffers = {buffer.data_ptr() for buffer in run.model.buffers()}
    stream, tensors = side_stream(run.world.device), []
    for tensor in leaves.tensors:
        if tensor.data_ptr() in buffers and tensor.is_cuda:
            tensor = tensor.clone()
            tensor.record_stream(stream)
        tensors.append(tensor)
    return leaves._replace(tensors=tensors)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
