"""How a run's state is kept while it trains: in memory step by step, on the storage now and then.

The loop waits only while its state is copied to memory that the keeper (keeper.py) has mapped too. To hash, write,
read back and tidy up is the keeper's, in a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raytrain import board
from raytrain.board import SLOTS, Board, Slots
from raytrain.checkpoint import Manifest
from raytrain.errors import CheckpointError, StorageError
from raytrain.payload import Blueprint, Leaves, OddPayload, Sheet, check_loadable, dumps, leaves_of, loads
from raytrain.progress import Progress
from raytrain.state import RunState, manifest_of, payload_of
from raytrain.store import CheckpointPolicy, Store, checkpoint_name
from raytrain.world import World

LEAST_S, MOST_S = 60.0, 3600.0  # between saves where EVERY_SECONDS is auto
TAKE_OVER_S = 45.0
KEEPER_GONE = (
    "the process that writes checkpoints has died; most often the machine ran out of memory (`dmesg` tells). "
    "The same command goes on from the newest checkpoint"
)
ERRORS = {error.__name__: error for error in (StorageError, CheckpointError)}


class TooSmall(Exception):  # noqa: N818 (nothing is wrong)
    """The slots cannot hold a state of size_bytes."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class Pending:
    """A save that was asked for. Another thread may wait for it.

    name:    of its checkpoint
    stall_s: seconds that the loop waited for it;  save_s: those until it was on the storage
    """

    def __init__(self, progress: Progress, may_be_replaced: bool) -> None:
        self.name, self.progress, self.may_be_replaced = checkpoint_name(progress), progress, may_be_replaced
        self.stall_s = self.save_s = 0.0
        self._over, self._exists = threading.Event(), False

    @classmethod
    def of_old(cls, progress: Progress) -> Pending:
        """Of a checkpoint that stands already."""
        save = cls(progress, may_be_replaced=False)
        save.over(exists=True)
        return save

    def over(self, exists: bool) -> None:
        self._exists = exists
        self._over.set()

    def wait(self) -> str | None:
        """The checkpoint's name once it is on the storage; None if a newer one took its place, or it failed."""
        self._over.wait()
        return self.name if self._exists else None


class Kept:
    """This process's side of the keeper of its host."""

    def __init__(self, run_uri: str, launch: str) -> None:
        """Joins the keeper of this launch, or starts it; one that another launch has left writes its state first."""
        self.line = board.started(run_uri, launch)
        told = self._greet(launch)
        if "other" in told:
            self.line.close()
            board.take_over(run_uri, TAKE_OVER_S)
            self.line = board.started(run_uri, launch)
            told = self._greet(launch)
        if "other" in told:
            raise StorageError(
                f"{run_uri}: another run is training in this folder on this host. Wait for it or end it, "
                "or give this one a folder of its own (--extra_tag NAME)"
            )
        self.hangs: list[dict[str, Any]] = told["hangs"]  # of workers before these
        self.board = Board(self.line.take())
        self.slots = Slots(self.line.take(), told["slot_bytes"]) if told["slot_bytes"] else None

    def _greet(self, launch: str) -> dict[str, Any]:
        self.line.say(op="hello", launch=launch)
        return self.line.hear()

    @property
    def newest(self) -> Progress | None:
        """Of the newest state that is kept on this host."""
        slot = self.board.newest()
        return None if slot is None or self.slots is None else self.board.progress(slot)

    def load(self) -> dict[str, Any]:
        """The payload of the newest state."""
        slot = self.board.newest()
        assert slot is not None and self.slots is not None, "newest said that there is one"
        return loads(self.slots.view(slot, self.board.size_bytes(slot)), "the state in memory")

    def close(self) -> None:
        self.line.close()


class Memory:
    """The keeper's slots, as this process fills them with states of the run."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._blueprint: Blueprint | None = None
        self._sheets: dict[int, Sheet] = {}
        self._transfer: Transfer | None = None

    def free_slot(self, used: set[int | None]) -> int | None:
        """One that is neither used, nor the newest, nor being filled."""
        taken = {*used, self._kept.board.newest(), self._transfer.slot if self._transfer else None}
        return next((slot for slot in range(SLOTS) if slot not in taken), None)

    def put(self, run: RunState, slot: int) -> bool:
        """Begin to copy the run's state to this slot; `settle` makes it the newest once it has arrived.

        Whether it was the first of its shape there. TooSmall, and nothing is done: `make_room` comes first.
        """
        payload = payload_of(run)
        leaves = leaves_of(payload)
        if self._blueprint is None or not self._blueprint.fits(leaves):
            self._sheets.clear()
            self._blueprint = blueprint_of(leaves)
        data = None if self._blueprint else dumps(payload)  # odd ones as a whole
        size_bytes = len(data) if data is not None else self._blueprint.size_bytes if self._blueprint else 0
        if self._kept.slots is None or size_bytes > self._kept.slots.slot_bytes:
            raise TooSmall(size_bytes)
        memory = self._kept.slots.view(slot, size_bytes)
        self._kept.board.begin(slot)
        self._transfer = Transfer(slot, run.progress, size_bytes, run.world.device)
        if data is not None or self._blueprint is None:
            memory[:] = data or b""
            self._transfer.begin(run, lambda: None)
            return False
        is_new = slot not in self._sheets
        if is_new:
            self._sheets[slot] = self._blueprint.sheet(memory)
        self._transfer.begin(run, functools.partial(self._sheets[slot].fill, leaves))
        if is_new:
            check_loadable(memory)
        return is_new

    def make_room(self, size_bytes: int) -> None:
        """Larger slots, for the keeper too; what is in the old ones is given up."""
        self._sheets.clear()
        self._kept.board.forget()
        self._kept.slots = slots = Slots.made(size_bytes)
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

    def __init__(self, slot: int, progress: Progress, size_bytes: int, device: torch.device) -> None:
        self.slot, self.progress, self.size_bytes = slot, progress, size_bytes
        self._device = device
        self._arrived: torch.cuda.Event | None = None
        self._finite = torch.empty(0)

    def begin(self, run: RunState, fill: Callable[[], None]) -> None:
        """`fill` is called, and what it launches on a GPU is waited for by the next optimizer step alone."""
        params = [p.detach() for p in run.model.parameters() if p.numel()]
        peaks = torch._foreach_norm(params, math.inf)
        finite = torch.stack([peak.float() for peak in peaks]).isfinite().all()
        if self._device.type != "cuda":
            self._finite = finite
            fill()
            return
        stream = side_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            fill()
            self._finite = finite.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(stream)
        run.engine.fence = self._arrived

    def is_over(self, wait: bool) -> bool:
        if self._arrived is not None and wait:
            self._arrived.synchronize()
        return self._arrived is None or self._arrived.query()

    def is_finite(self) -> bool:
        return bool(self._finite)


class Pace:
    """Every how many steps a state is copied to memory, so that it takes `share` of the time at most."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._cost_s: float | None = None
        self._step_s = 0.0
        self._since, self._ended_at = 0, time.perf_counter()

    def is_due(self, every: Any) -> bool:
        """Ask once after each step. every: steps, "auto", or None for never."""
        now = time.perf_counter()
        step_s, self._ended_at = now - self._ended_at, now
        self._step_s = 0.9 * self._step_s + 0.1 * step_s if self._step_s else step_s
        self._since += 1
        if every == "auto":
            every = 1 if self._cost_s is None else math.ceil(self._cost_s / (self._share * self._step_s))
        return every is not None and self._since >= every

    def took(self, cost_s: float, first: bool) -> None:
        """It was done, and took so long; the first time, when all is laid out, says nothing of the others."""
        self._since, self._ended_at = 0, time.perf_counter()
        if not first:
            self._cost_s = cost_s if self._cost_s is None else 0.8 * self._cost_s + 0.2 * cost_s


class Saves:
    """The states of one run on their way to memory and storage."""

    def __init__(self, store: Store, kept: Kept | None) -> None:
        """kept: None where this rank copies nothing to memory. Then a save is written before it returns."""
        self.store, self.policy = store, store.policy
        self._kept, self._memory = kept, Memory(kept) if kept else None
        self._orders: dict[int, tuple[Pending | None, int | None]] = {}
        self._number = 0
        self._answers = kept.board.answers if kept else 0
        self._done: list[Pending] = []
        self._saved_at: float | None = None
        self._interval_s = LEAST_S
        self._pace = Pace(self.policy.OVERHEAD)

    def describe(self, run: RunState, driver: Sequence[Any] | None) -> None:
        """What the keeper has to know to save a state by itself."""
        if self._kept is not None:
            policy = {name: getattr(self.policy, name) for name in CheckpointPolicy.__annotations__}
            self._say(op="about", manifest=fields_of(manifest_of(run, None)), policy=policy, driver=driver)

    def after_step(self, run: RunState) -> None:
        """Keep the state in memory if that is due; what went wrong in the background is raised here."""
        if self._kept is None or self._memory is None:
            return
        if self._kept.board.answers != self._answers:
            self._hear()
        self._memory.settle(wait=False)
        due = self._pace.is_due(self.policy.SNAPSHOT_EVERY)
        slot = self._memory.free_slot(self._used()) if due else None
        if slot is None or run.progress.cursor == 0:  # an epoch's end has more to it than the state: save() keeps it
            return
        began = time.perf_counter()
        first = self._put(run, slot)
        self._memory.settle(wait=False)
        self._pace.took(time.perf_counter() - began, first)

    def time_due(self, now: float) -> bool:
        """True if EVERY_SECONDS have passed since the last save, or since the first call. Ask on rank 0 only."""
        if self._saved_at is None:
            self._saved_at = now
        every = self.policy.EVERY_SECONDS
        return every is not None and now - self._saved_at >= (self._interval_s if every == "auto" else every)

    def finished(self) -> list[Pending]:
        """The saves that are on the storage since this was last asked."""
        done, self._done = self._done, []
        return done

    def save(
        self, run: RunState, metrics: dict[str, float | None] | None, now: float, may_be_replaced: bool = False
    ) -> Pending:
        """Begin to save the run's state. One that waits to be written gives way to a newer one, if it may."""
        began = time.perf_counter()
        pending = Pending(run.progress, may_be_replaced)
        self._saved_at = now
        manifest = manifest_of(run, metrics)
        if self._memory is None:
            self.store.save(dumps(payload_of(run)), manifest, now)
            pending.stall_s = time.perf_counter() - began
            self._record(pending, pending.stall_s, 0.0)
            return pending
        self._memory.settle(wait=True)
        while self._is_full() or (slot := self._memory.free_slot(self._used())) is None:
            self._hear(wait=True)
        self._put(run, slot)
        self._memory.settle(wait=True)
        self._order(pending, slot, op="save", manifest=fields_of(manifest), may_be_replaced=may_be_replaced)
        pending.stall_s = time.perf_counter() - began
        return pending

    def add_metrics(self, name: str, metrics: dict[str, float]) -> None:
        """Checkpoint `name` gets the metrics of its evaluation, once it is there."""
        if self._kept is None:
            self.store.add_metrics(name, metrics)
        else:
            self._order(None, None, op="metrics", name=name, metrics=fields_of_metrics(metrics))

    def settle(self) -> None:
        """Returns when nothing is left to be written; raises what went wrong."""
        while self._orders:
            self._hear(wait=True)

    def end(self) -> None:
        """The run is over and all of it saved: the keeper ends."""
        self.settle()
        if self._kept is not None:
            self._say(op="end")
            with contextlib.suppress(EOFError, OSError):
                self._kept.line.hear()

    def _put(self, run: RunState, slot: int) -> bool:
        """Copies the run's state; whether it was the first of its shape."""
        assert self._memory is not None
        try:
            return self._memory.put(run, slot)
        except TooSmall as found:
            self.settle()  # the keeper still reads from the old ones
            self._memory.make_room(found.size_bytes)
            return self._memory.put(run, slot)

    def _used(self) -> set[int | None]:
        return {slot for _, slot in self._orders.values()}

    def _is_full(self) -> bool:
        """Whether one save is being written, and another waits that must not give way."""
        saves = [pending for pending, _ in self._orders.values() if pending is not None]
        return len(saves) > 1 and not saves[-1].may_be_replaced

    def _order(self, pending: Pending | None, slot: int | None, **message: Any) -> None:
        self._number += 1
        self._orders[self._number] = pending, slot
        self._say(number=self._number, slot=slot, **message)

    def _say(self, **message: Any) -> None:
        assert self._kept is not None
        try:
            self._kept.line.say(**message)
        except OSError as error:
            raise StorageError(KEEPER_GONE) from error

    def _hear(self, wait: bool = False) -> None:
        """Takes the keeper's answers that are there; with `wait`, at least one."""
        assert self._kept is not None
        self._answers = self._kept.board.answers
        line = self._kept.line
        try:
            while wait or line.hears():
                wait = False
                self._take(**line.hear())
        except (EOFError, OSError) as error:
            raise StorageError(KEEPER_GONE) from error

    def _take(self, number: int, **answer: Any) -> None:
        pending, _ = self._orders.pop(number)
        if "error" in answer:
            if pending is not None:
                pending.over(exists=False)
            what = f"the checkpoint of step {pending.progress.step}" if pending else "the metrics of a checkpoint"
            error = ERRORS.get(answer["kind"], StorageError)
            raise error(f"{what} could not be saved: {answer['error']}")
        if pending is not None and "replaced" in answer:
            pending.over(exists=False)
        elif pending is not None:
            self._record(pending, **answer)

    def _record(self, pending: Pending, seconds: float, cpu_s: float) -> None:
        """It is saved, which took so long, and so much of a core."""
        pending.save_s = seconds
        pending.over(exists=True)
        self._done.append(pending)
        least_s = max((pending.stall_s + cpu_s) / self.policy.OVERHEAD, 2 * seconds, LEAST_S)
        self._interval_s = min(least_s, MOST_S)


def blueprint_of(leaves: Leaves) -> Blueprint | None:
    try:
        return Blueprint(leaves)
    except OddPayload:
        return None


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fields_of(manifest: Manifest) -> dict[str, Any]:
    """Of a manifest, what the keeper cannot know."""
    metrics = None if manifest.metrics is None else fields_of_metrics(manifest.metrics)
    return {"config": manifest.config, "world": manifest.world, "seed": manifest.seed, "metrics": metrics}


def fields_of_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}


def join_keeper(run_uri: str, launch: str, world: World) -> tuple[Kept | None, bool]:
    """Collective. This process's side of its host's keeper, and whether this rank is to copy states to it.

    Rank 0 does, and the first rank of one other host: it has the same state, so nothing travels for that.
    None where the system has no such memory.
    """
    hosts = world.all_objects(board.host() if board.is_possible() else None)
    if None in hosts:
        return None, False
    first = [hosts.index(host) for host in hosts]
    kept = Kept(run_uri, launch) if first[world.rank] == world.rank else None  # it starts the keeper of its host
    told = world.all_objects(kept.hangs if kept else [])
    keepers = sorted(set(first))[:2]
    kept = kept or Kept(run_uri, launch)
    kept.hangs = [hang for hangs in told for hang in hangs]
    return kept, world.rank in keepers
