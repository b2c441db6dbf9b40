"""What the keeper writes to the run's checkpoints while it listens: one request after another, in a thread."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from raytrain.errors import RaytrainError
from raytrain.keeper.channel import Channel
from raytrain.progress import Progress
from raytrain.storage.store import FOLDER, Store, checkpoint_name

if TYPE_CHECKING:
    from raytrain.keeper.keeper import Keeper


@dataclasses.dataclass(eq=False)
class WriteRequest:
    """What a worker wants written: the state in a slot, or the metrics of a checkpoint.

    data, progress: that state
    """

    channel: Channel
    number: int
    slot: int | None
    manifest: dict[str, Any]
    data: memoryview | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)
    name: str = ""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    may_be_replaced: bool = False


class Writer:
    """A thread that carries out requests, one after another."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._requests: queue.Queue[WriteRequest | None] = queue.Queue()
        self._lock = threading.Lock()
        self._replaced: set[WriteRequest] = set()
        self._waiting: WriteRequest | None = None
        self.is_idle = True
        self._thread = threading.Thread(target=self._write_all, name="raytrain-writer", daemon=True)
        self._thread.start()

    def take(self, request: WriteRequest) -> None:
        """Carries it out after those before; a save that waits gives way to a newer one if it may."""
        with self._lock:
            waiting = self._waiting
            if waiting is not None and waiting.may_be_replaced and request.slot is not None:
                self._replaced.add(waiting)
                self._reads(waiting, -1)
                self._keeper.reply(waiting.channel, number=waiting.number, replaced=True)
            if request.slot is not None:
                self._waiting = request
            self._reads(request, 1)
            self.is_idle = False
            self._requests.put(request)

    def close(self) -> None:
        """Returns once all requests are carried out."""
        self._requests.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (request := self._requests.get()) is not None:
            with self._lock:
                if self._waiting is request:
                    self._waiting = None
                replaced = request in self._replaced
                self._replaced.discard(request)
            if not replaced:
                outcome = self._outcome(request)
                with self._lock:
                    self._reads(request, -1)
                self._keeper.reply(request.channel, number=request.number, **outcome)
            with self._lock:
                self.is_idle = self._requests.empty()

    def _reads(self, request: WriteRequest, change: int) -> None:
        if request.slot is not None:
            self._keeper.status.read_by(request.slot, change)

    def _outcome(self, request: WriteRequest) -> dict[str, Any]:
        began, began_cpu = time.monotonic(), time.thread_time()
        try:
            weights = self._write(request)
        except Exception as error:
            text = str(error) if isinstance(error, RaytrainError) else traceback.format_exc()
            return {"error": text, "kind": type(error).__name__}
        return {"seconds": time.monotonic() - began, "cpu_s": time.thread_time() - began_cpu, "weights": weights}

    def _write(self, request: WriteRequest) -> str:
        """The fingerprint of the state that was written; "" if none was."""
        store = self._keeper.store()
        if request.data is None:
            if store.storage.exists(f"{FOLDER}/{request.name}"):
                store.add_metrics(request.name, request.metrics)
            else:
                self._save_again(store, request)
            return ""
        return self._keeper.save(store, request.data, request.progress, request.manifest).weights

    def _save_again(self, store: Store, request: WriteRequest) -> None:
        """Somebody has removed the checkpoint that these metrics are of: it is saved with them, if it is the newest."""
        keeper = self._keeper
        slot = keeper.status.newest()
        if slot is None or checkpoint_name(keeper.status.progress(slot)) != request.name:
            return  # memory holds what came after it
        keeper.status.read_by(slot, 1)
        try:
            manifest = {**keeper.description["manifest"], "metrics": request.metrics}
            keeper.save(store, keeper.state(slot), keeper.status.progress(slot), manifest)
        finally:
            keeper.status.read_by(slot, -1)
