"""A run's newest states in memory that outlives its processes: as the workers of a run see it, and fill it."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from raytrain.engine.state import RunState, payload_of, size_to_come
from raytrain.engine.world import World
from raytrain.errors import PreflightError
from raytrain.keeper import client
from raytrain.keeper.shared_memory import SLOTS, Board, Slots
from raytrain.progress import Progress
from raytrain.storage import processes
from raytrain.storage.state_file import Blueprint, Leaves, OddPayload, Sheet, check_loadable, dumps, leaves_of, loads

WITHOUT = "no memory beside this process for the run's state, so training waits for each checkpoint to be written"
TAKE_OVER_S = 35.0  # so long the workers of an earlier launch may take to die


class TooSmall(Exception):  # noqa: N818 (nothing is wrong)
    """The slots cannot hold a state of size_bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class Kept:
    """This process's side of the keeper of its host.

    leads: whether it is the first of its host;  keeps: whether it copies states to the keeper's memory
    hangs: why workers before this one were killed (watchdog.Hang.told)
    """

    def __init__(self, run_uri: str, launch: str, leads: bool = True, keeps: bool = True) -> None:
        """Joins the keeper of this launch, or starts it; one that another launch has left writes its state first."""
        self._run_uri, self._launch, self.leads, self.keeps = run_uri, launch, leads, keeps
        self.join()

    def join(self) -> None:
        """At first, and again after a keeper that has died."""
        try:
            told = self._greet()
        except (EOFError, ConnectionError):  # it was about to end, and saved its state
            told = self._greet()
        if "other" in told:
            client.take_over(self._run_uri, TAKE_OVER_S)
            told = self._greet()
        if "other" in told:
            raise PreflightError(
                f"{self._run_uri}: another run is training in this folder on this host. Wait for it or end it, "
                "or give this one a folder of its own (--extra_tag NAME)"
            )
        self.hangs: list[dict[str, Any]] = told["hangs"]
        self.board = Board(self.line.take())
        self.slots = Slots(self.line.take(), told["slot_bytes"]) if told["slot_bytes"] else None

    def _greet(self) -> dict[str, Any]:
        self.line = client.started(self._run_uri, self._launch)
        self.line.say(op="hello", launch=self._launch)
        told = self.line.hear_within(client.START_S)
        if "other" in told:
            self.line.close()
        return told

    @property
    def newest(self) -> Progress | None:
        """Of the newest state that is kept on this host."""
        slot = self.board.newest()
        return None if slot is None or self.slots is None else self.board.progress(slot)

    def state(self, slot: int) -> memoryview:
        """The checkpoint.pth in a slot."""
        assert self.slots is not None, "something was written there"
        return self.slots.view(slot, self.board.size_bytes(slot))

    def load(self) -> dict[str, Any]:
        """The payload of the newest state."""
        slot = self.board.newest()
        assert slot is not None, "newest said that there is one"
        return loads(self.state(slot), "the state in memory")

    def end(self) -> None:
        """The run is over, and all of it is saved: the keeper ends, and this returns when it has."""
        with contextlib.suppress(EOFError, OSError):
            self.line.say(op="end")
            self.line.hear_within(client.SAVE_S)

    def close(self) -> None:
        self.line.close()


def keeper_begun(run_uri: str, launch: str) -> threading.Thread:
    """Has a keeper started on this host; what is done until this ends does not wait for that."""

    def start() -> None:
        with contextlib.suppress(OSError):  # join_keeper tells, if that fails too
            client.started(run_uri, launch).close()

    thread = threading.Thread(target=start, name="raytrain-keeper", daemon=True)
    thread.start()
    return thread


def join_keeper(run_uri: str, launch: str, world: World) -> tuple[Kept | None, list[str]]:
    """Collective. This process's side of its host's keeper, and what a user should know.

    None where the system has no such memory, or gives none. States are copied by rank 0, and by the first rank of one
    other host: that has the same state, so nothing travels.
    """
    hosts = world.all_objects(processes.host() if client.is_possible() else None)
    if None in hosts:
        return None, []
    firsts = [hosts.index(host) for host in hosts]
    leads = firsts[world.rank] == world.rank
    kept, refusal = None, ""
    if leads:
        try:
            kept = Kept(run_uri, launch, leads, world.rank in sorted(set(firsts))[:2])
        except (OSError, EOFError) as error:
            refusal = str(error) or "its process ended"
    answers = world.all_objects((refusal, kept.hangs if kept else []))  # from here on each host's keeper stands
    refusals = [refusal for refusal, _ in answers if refusal]
    if refusals:
        if kept is not None:
            kept.end()
        return None, [f"{WITHOUT}: {refusals[0]}"]
    kept = kept or Kept(run_uri, launch, leads=False, keeps=False)
    kept.hangs = [hang for _, hangs in answers for hang in hangs]
    return kept, []


class Memory:
    """The keeper's slots, as this process fills them with states of the run."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._blueprint: Blueprint | None = None
        self._sheets: dict[int, Sheet] = {}
        self._transfer: Transfer | None = None

    def free_slot(self, used: set[int | None]) -> int | None:
        """One that is neither used, nor the newest, nor being filled, nor written by the keeper for a dead worker."""
        board = self._kept.board
        taken = {*used, board.newest(), self._transfer.slot if self._transfer else None}
        return next((slot for slot in range(SLOTS) if slot not in taken and not board.is_read(slot)), None)

    def put(self, run: RunState, slot: int, finite: torch.Tensor) -> bool:
        """Begin to copy the run's state to this slot; `settle` makes it the newest once it has arrived, if `finite`.

        Whether it was the first of its shape there. TooSmall, and nothing is done: `make_room` comes first.
        """
        payload = payload_of(run)
        leaves = leaves_of(payload)
        on_gpu = run.world.device.type == "cuda"
        if self._blueprint is None or not self._blueprint.fits(leaves):
            self._sheets.clear()
            self._blueprint = blueprint_of(leaves)
        blueprint = self._blueprint
        data = dumps(payload) if blueprint is None else b""  # odd ones as a whole
        size_bytes = len(data) if blueprint is None else blueprint.size_bytes
        if self._kept.slots is None or size_bytes > self._kept.slots.slot_bytes:
            raise TooSmall(size_bytes)
        memory = self._kept.slots.view(slot, size_bytes)
        self._kept.board.begin(slot)
        self._transfer = Transfer(slot, run.progress, size_bytes, finite)
        if blueprint is None:
            memory[:] = data
            self._transfer.begin(run, lambda: None)
            return False
        is_new = slot not in self._sheets
        if is_new:
            self._kept.slots.touch(slot * self._kept.slots.slot_bytes, size_bytes)
            if on_gpu:
                pin(memory)
            self._sheets[slot] = blueprint.sheet(memory)
        if on_gpu:
            leaves = without_buffers(leaves, run)
        self._transfer.begin(run, functools.partial(self._sheets[slot].fill, leaves))
        if is_new:
            check_loadable(memory)
        return is_new

    def prepare(self, run: RunState) -> None:
        """Slots that will do for this run, unless a worker before has left some: the keeper fetches their memory."""
        if self._kept.slots is None:
            self.make_room(size_to_come(run))

    def make_room(self, size_bytes: int) -> None:
        """Larger slots, for the keeper too; of what is in the old ones, the newest state moves along."""
        self._sheets.clear()
        board, newest, slots = self._kept.board, self._kept.board.newest(), Slots.made(size_bytes)
        if newest is not None and self._kept.slots is not None:
            state = self._kept.state(newest)
            slots.view(newest, len(state))[:] = state  # in the same slot: the board is right for old and new ones
        board.forget_all_but(newest)
        self._kept.slots = slots
        self._kept.line.say(op="slots", slot_bytes=slots.slot_bytes)
        self._kept.line.give(slots.descriptor)

    def settle(self, wait: bool) -> None:
        """What has arrived is the newest state, unless there is NaN in it; with `wait`, what is under way too."""
        transfer = self._transfer
        if transfer is None or not transfer.is_over(wait):
            return
        self._transfer = None
        if transfer.is_finite():
            self._kept.board.commit(transfer.slot, transfer.progress, transfer.size_bytes)


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


def blueprint_of(leaves: Leaves) -> Blueprint | None:
    try:
        return Blueprint(leaves)
    except OddPayload:
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
