"""How a run's state is kept while it trains: in memory step by step, on the storage now and then.

The loop waits only while its state is copied to memory that the keeper (keeper/keeper.py) has mapped too. To hash,
write, read back and tidy up is the keeper's, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from raytrain.engine.state import RunState, manifest_of, payload_of
from raytrain.errors import CheckpointError, RaytrainError, StorageError
from raytrain.keeper.client import WITHOUT, KeeperClient
from raytrain.keeper.snapshots import Pace, Snapshots, TooSmall
from raytrain.progress import Progress
from raytrain.storage.checkpoint import Manifest
from raytrain.storage.state_file import dumps
from raytrain.storage.store import CheckpointPolicy, Store, checkpoint_name

LEAST_S, MOST_S = 60.0, 3600.0  # between saves where EVERY_SECONDS is auto
LOOK_S = 0.02
HEAR_S = 1.0  # so often it is looked whether the keeper lives
ERRORS = {error.__name__: error for error in (StorageError, CheckpointError)}


class PendingSave:
    """A save that was asked for. Another thread may wait for it.

    name:    of its checkpoint
    stall_s: seconds that the loop waited for it;  save_s: those until it was on the storage
    weights: the fingerprint of its tensors, once it is there
    """

    def __init__(self, progress: Progress, may_be_replaced: bool) -> None:
        self.name, self.progress, self.may_be_replaced = checkpoint_name(progress), progress, may_be_replaced
        self.stall_s = self.save_s = 0.0
        self.weights = ""
        self._over, self._exists = threading.Event(), False

    @classmethod
    def of_old(cls, progress: Progress) -> PendingSave:
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


@dataclasses.dataclass(frozen=True)
class UnansweredRequest:
    """What the keeper was asked to write: the state in a slot, or the metrics of a checkpoint."""

    save: PendingSave | None
    slot: int | None
    message: dict[str, Any]


class Checkpointer:
    """The states of one run on their way to memory and storage.

    notes: lines for the journal, to be taken out
    """

    def __init__(self, store: Store, keeper: KeeperClient | None) -> None:
        """keeper: None where nothing is copied to memory. Then a save is written before it returns."""
        self.store, self.policy = store, store.policy
        self._keeper = keeper if keeper is not None and keeper.keeps else None
        self._snapshots = Snapshots(self._keeper) if self._keeper else None
        self.notes: list[str] = []
        self._description: dict[str, Any] = {}
        self._requests: dict[int, UnansweredRequest] = {}
        self._number = 0
        self._answers = self._keeper.status.answers if self._keeper else 0
        self._done: list[PendingSave] = []
        self._saved_at: float | None = None
        self._due, self._heard_at = False, time.monotonic()
        self._interval_s = LEAST_S
        self._pace = Pace(self.policy.OVERHEAD)

    def describe(self, run: RunState, driver: Sequence[Any]) -> None:
        """What the keeper has to know to save a state by itself; driver: as Job has it."""
        if self._keeper is not None:
            policy = {name: getattr(self.policy, name) for name in CheckpointPolicy.__annotations__}
            self._description = {"manifest": fields_of(manifest_of(run, None)), "policy": policy, "driver": driver}
            self._say(op="describe", **self._description)

    def prepare(self, run: RunState) -> None:
        """Have memory for the states fetched from the system before the first one is copied."""
        if self._snapshots is not None:
            try:
                self._snapshots.prepare(run)
            except OSError as error:
                self._do_without(error)

    def after_step(self, run: RunState) -> bool:
        """Keep the state in memory if that is due; whether it was. What failed in the background is raised here."""
        if self._keeper is None or self._snapshots is None:
            return False
        now = time.monotonic()
        if self._keeper.status.answers != self._answers or now - self._heard_at > HEAR_S:
            self._heard_at = now
            self._hear()
        self._snapshots.settle(wait=False)
        self._due = self._pace.is_due(self.policy.SNAPSHOT_EVERY)
        # An epoch's end may have more to it than the state: that is save()'s, or after_epoch()'s if nothing is saved.
        return self._due and run.progress.cursor > 0 and self._keep(run)

    def after_epoch(self, run: RunState) -> bool:
        """Keep the state at the end of an epoch that is neither saved nor evaluated, if that is due; whether it was."""
        return self._snapshots is not None and self._due and self._keep(run)

    def _keep(self, run: RunState) -> bool:
        """Copy the run's state to memory, if there is a place for it; whether it was."""
        assert self._snapshots is not None
        slot = self._snapshots.free_slot(self._used())
        if slot is None:
            return False
        began = time.perf_counter()
        try:
            first = self._put(run, slot, run.engine.stepper.are_finite())
        except OSError as error:
            self._do_without(error)
            return False
        self._snapshots.settle(wait=False)
        self._pace.took(time.perf_counter() - began, first)
        return True

    def time_due(self, now: float) -> bool:
        """True if EVERY_SECONDS have passed since the last save, or since the first call. Ask on rank 0 only."""
        if self._saved_at is None or now < self._saved_at:  # or the clock was set back
            self._saved_at = now
        every = self.policy.EVERY_SECONDS
        return every is not None and now - self._saved_at >= (self._interval_s if every == "auto" else every)

    def finished(self) -> list[PendingSave]:
        """The saves that are on the storage since this was last asked."""
        done, self._done = self._done, []
        return done

    def save(
        self, run: RunState, metrics: dict[str, float | None] | None, now: float, may_be_replaced: bool = False
    ) -> PendingSave:
        """Begin to save the run's state, which is finite. One that waits gives way to a newer one, if it may."""
        began = time.perf_counter()
        save = PendingSave(run.progress, may_be_replaced)
        self._saved_at = now
        manifest = manifest_of(run, metrics)
        slot = self._filled(run) if self._snapshots is not None else None
        if slot is None:
            saved = self.store.save(dumps(payload_of(run)), manifest, now)
            save.stall_s = time.perf_counter() - began
            self._record(save, save.stall_s, 0.0, saved.manifest.weights)
        else:
            self._request(save, slot, op="save", manifest=fields_of(manifest), may_be_replaced=may_be_replaced)
            save.stall_s = time.perf_counter() - began
        return save

    def add_metrics(self, name: str, metrics: dict[str, float]) -> None:
        """Checkpoint `name` gets the metrics of its evaluation, once it is there."""
        if self._keeper is None:
            self.store.add_metrics(name, metrics)
        else:
            self._request(None, None, op="metrics", name=name, metrics=metrics)

    def settle(self) -> None:
        """Returns when nothing is left to be written; raises what went wrong."""
        while self._requests:
            self._hear(wait=True)

    def _filled(self, run: RunState) -> int | None:
        """A slot with the run's state, once there is a free one; None if there is no memory for it."""
        assert self._snapshots is not None
        self._snapshots.settle(wait=True)
        while self._is_full() or (slot := self._snapshots.free_slot(self._used())) is None:
            if self._requests:
                self._hear(wait=True)
            else:
                time.sleep(LOOK_S)  # the keeper writes what workers that have died had asked for, and tells nobody
                self._hear()  # it may die meanwhile
        try:
            self._put(run, slot, torch.tensor(True))
        except OSError as error:
            self._do_without(error)
            return None
        self._snapshots.settle(wait=True)
        self._pace.begin_anew()
        return slot

    def _do_without(self, error: OSError) -> None:
        """No state is kept in memory from here on: the system gives none."""
        self.settle()
        self._keeper = self._snapshots = None
        self.notes.append(f"{WITHOUT}: {error.strerror or error}")

    def _put(self, run: RunState, slot: int, finite: torch.Tensor) -> bool:
        """Copies the run's state; whether it was the first of its shape there."""
        assert self._snapshots is not None
        try:
            return self._snapshots.put(run, slot, finite)
        except TooSmall as error:
            self.settle()  # the keeper still reads from the old ones
            self._snapshots.make_room(error.size_bytes)
            return self._snapshots.put(run, slot, finite)

    def _used(self) -> set[int | None]:
        return {request.slot for request in self._requests.values()}

    def _is_full(self) -> bool:
        """Whether one save is being written, and another waits that must not give way."""
        saves = [request.save for request in self._requests.values() if request.save is not None]
        return len(saves) > 1 and not saves[-1].may_be_replaced

    def _request(self, save: PendingSave | None, slot: int | None, **message: Any) -> None:
        self._number += 1
        self._requests[self._number] = UnansweredRequest(save, slot, message)
        self._say(number=self._number, slot=slot, **message)

    def _say(self, **message: Any) -> None:
        assert self._keeper is not None
        try:
            self._keeper.channel.send(**message)
        except OSError:
            self._replace_keeper()

    def _hear(self, wait: bool = False) -> None:
        """Takes the keeper's answers that are there; with `wait`, at least one."""
        assert self._keeper is not None
        self._answers = self._keeper.status.answers
        channel = self._keeper.channel
        try:
            answers = [channel.receive()] if wait else []
            while channel.poll():
                answers.append(channel.receive())
        except (EOFError, OSError):
            self._replace_keeper()
            return
        failures = []
        for answer in answers:  # all of them, whatever one says: nobody would answer these requests again
            try:
                self._take(**answer)
            except RaytrainError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _replace_keeper(self) -> None:
        """The keeper has died (no memory left, kill -9): what it had to write is written here, and another one begins.

        Its memory is this process's too, so nothing is lost.
        """
        keeper = self._keeper
        assert keeper is not None
        requests, self._requests = self._requests, {}
        for request in requests.values():
            if request.save is None:
                self.store.add_metrics(request.message["name"], request.message["metrics"])
            elif request.slot is not None:
                began = time.perf_counter()
                manifest = Manifest(request.save.progress, **request.message["manifest"])
                saved = self.store.save(keeper.state(request.slot), manifest, time.time())
                self._record(request.save, time.perf_counter() - began, 0.0, saved.manifest.weights)
        keeper.close()
        keeper.join()
        self._snapshots, self._answers = Snapshots(keeper), keeper.status.answers
        self._say(op="describe", **self._description)

    def _take(self, number: int, **answer: Any) -> None:
        save = self._requests.pop(number).save
        if "error" in answer:
            if save is not None:
                save.over(exists=False)
            what = f"the checkpoint of step {save.progress.step}" if save else "the metrics of a checkpoint"
            error = ERRORS.get(answer["kind"], StorageError)
            raise error(f"{what} could not be saved: {answer['error']}")
        if save is not None and "replaced" in answer:
            save.over(exists=False)
        elif save is not None:
            self._record(save, **answer)

    def _record(self, save: PendingSave, seconds: float, cpu_s: float, weights: str = "") -> None:
        """It is saved, which took so long, and so much of a core."""
        save.save_s, save.weights = seconds, weights
        save.over(exists=True)
        self._done.append(save)
        least_s = max((save.stall_s + cpu_s) / self.policy.OVERHEAD, 2 * seconds, LEAST_S)
        self._interval_s = min(least_s, MOST_S)


def fields_of(manifest: Manifest) -> dict[str, Any]:
    """Of a manifest, what the keeper cannot know."""
    return {name: getattr(manifest, name) for name in ("config", "world", "seed", "metrics", "source")}
