"""How a worker talks to whoever launched it: wishes in; records, checkpoints and failures out."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from raytrain.data.feed import Feed
from raytrain.engine.state import RunState
from raytrain.journal.records import Record
from raytrain.keeper.checkpointer import PendingSave
from raytrain.progress import Progress

TWICE_S = 0.3  # a signal that comes again within that is the same one; those of `timeout` are microseconds apart

# Given a run's progress and the metrics of the evaluation just made: whether it is to go on. A sweep's, for its trials.
Judge = Callable[[Progress, dict[str, float]], bool]


def never_ends(progress: Progress, metrics: dict[str, float]) -> bool:
    """A run that is no trial of a sweep goes on until all its epochs are trained."""
    return True


class Control:
    """What the loop asks of the outside; a Journal sink too, since records are what the outside is shown.

    It also knows where the run stands, for whoever has to explain a failure.

    in_a_worker: whether this process was started for the run, by Ray
    """

    in_a_worker = False

    def __init__(self) -> None:
        self._stage: str | None = ""
        self._run: RunState | None = None
        self._feed: Feed | None = None

    def begin(self, stage: str) -> None:
        """From now on it is `stage` that fails, if something does."""
        self._stage = stage

    def follow(self, run: RunState, feed: Feed) -> None:
        """From now on it is the step that `run` takes, or the evaluation whose batches `feed` gives."""
        self._stage, self._run, self._feed = None, run, feed

    def place(self) -> dict[str, Any]:
        """What is under way, for the failure screen."""
        if self._stage is not None or self._run is None or self._feed is None:
            return {"what": self._stage} if self._stage else {}
        batch = self._feed.current
        samples = {"sample_ids": list(batch.ids) if batch else None}
        if batch and batch.split == "val":
            return {"what": f"The evaluation after epoch {batch.epoch}", **samples}
        return {"epoch": self._run.progress.epoch, "step": self._run.progress.step + 1, **samples}

    def now(self) -> float:
        return time.time()

    def stop_wished(self) -> bool:
        return False

    def saved(self, save: PendingSave | None, metrics: dict[str, float]) -> None:
        """Collective. A checkpoint is on its way (`save` on rank 0, None elsewhere), perhaps with metrics."""

    def goes_on(self, progress: Progress, metrics: dict[str, float]) -> bool:
        """Rank 0 only. Whether the run is to go on after this evaluation; all its state is saved."""
        return True

    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class LocalControl(Control):
    """In-process: records go straight to the display, signals of this process wish a stop."""

    def __init__(self, show: Callable[[Record], None], stop: threading.Event, judge: Judge = never_ends) -> None:
        super().__init__()
        self._show, self._stop, self._judge = show, stop, judge

    def stop_wished(self) -> bool:
        return self._stop.is_set()

    def goes_on(self, progress: Progress, metrics: dict[str, float]) -> bool:
        return self._judge(progress, metrics)

    def write(self, record: Record) -> None:
        self._show(record)


@contextlib.contextmanager
def signals_wish_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one ends this process as it always would.

    Not one within TWICE_S of it: `timeout` signals its command, and then the group that this is in.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first_at = 0.0

    def wish(number: int, frame: Any) -> None:
        nonlocal first_at
        if not stop.is_set():
            stop.set()
            first_at = time.monotonic()
        elif time.monotonic() - first_at > TWICE_S:
            for each, handler in kept.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    for number in kept:
        signal.signal(number, wish)
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
