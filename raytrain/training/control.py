"""How a worker talks to whoever launched it: wishes in; records, checkpoints and failures out."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from raytrain.data.feed import Feed
from raytrain.engine.state import RunState
from raytrain.journal.records import Record
from raytrain.keeper.checkpointer import PendingSave
from raytrain.progress import Progress

# Given a run's progress and the metrics of the evaluation just made: whether it is to go on. A sweep's, for its trials.
Judge = Callable[[Progress, dict[str, float]], bool]


def never_ends(progress: Progress, metrics: dict[str, float]) -> bool:
    """A run that is no trial of a sweep goes on until all its epochs are trained."""
    return True


@dataclasses.dataclass(frozen=True)
class Restart:
    """How it comes that the workers were started again.

    why:         "" where nobody knows
    num_workers: that there were before, None where that is not known
    stopped_at:  when their last step ended, in seconds since 1970; None as well
    is_planned:  whether they ended with a step, so that none is repeated
    """

    why: str
    num_workers: int | None = None
    stopped_at: float | None = None
    is_planned: bool = False


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
        self.stepped_at: float | None = None

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

    def stepped(self) -> None:
        """A step has just ended."""
        self.stepped_at = self.now()

    def now(self) -> float:
        return time.time()

    def stop_wished(self) -> bool:
        return False

    def saved(self, save: PendingSave | None, metrics: dict[str, float]) -> None:
        """Collective. A checkpoint is on its way (`save` on rank 0, None elsewhere), perhaps with metrics."""

    def goes_on(self, progress: Progress, metrics: dict[str, float]) -> bool:
        """Rank 0 only. Whether the run is to go on after this evaluation; all its state is saved."""
        return True

    def take_restart(self, num_workers: int) -> Restart | None:
        """Rank 0 only. How it comes that these `num_workers` were started; None if they are the first."""
        return None

    def is_moved(self) -> bool:
        """Rank 0 only. Whether the workers stop for others alone, who go on at once."""
        return False

    def tell_of_wait(self, message: str) -> None:
        """What keeps the run from beginning."""
        self.write({"kind": "event", "time": self.now(), "event": "waiting", "message": message})

    def write(self, record: Record) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class LocalControl(Control):
    """In-process: records go straight to the display, signals of this process wish a stop.

    restart: why the workers were started again; None if they were not
    """

    def __init__(
        self,
        show: Callable[[Record], None],
        stop: threading.Event,
        judge: Judge = never_ends,
        restart: str | None = None,
    ) -> None:
        super().__init__()
        self._show, self._stop, self._judge, self._restart = show, stop, judge, restart

    def take_restart(self, num_workers: int) -> Restart | None:
        return None if self._restart is None else Restart(self._restart)

    def stop_wished(self) -> bool:
        return self._stop.is_set()

    def goes_on(self, progress: Progress, metrics: dict[str, float]) -> bool:
        return self._judge(progress, metrics)

    def write(self, record: Record) -> None:
        self._show(record)
