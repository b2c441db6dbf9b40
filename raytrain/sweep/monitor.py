"""Writes down what Ray Tune's trials come to, shows it, and ends the sweep: on a signal, a spent budget, failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial

from raytrain.cluster.mailbox import Mailbox
from raytrain.errors import TrainingError, masked
from raytrain.sweep.ledger import LEDGER, trial_folder
from raytrain.sweep.sweep import Sweep
from raytrain.sweep.trial import DIVERGED, MAX_PROCESS_DEATHS
from raytrain.sweep.view import SweepView, TrialView

ShowSweep = Callable[[SweepView, float], None]  # and the time, in unix seconds


class TrialsLeft(Protocol):
    """Those of the sweep that have not come to their end."""

    def are_left(self) -> bool: ...


def failures(view: SweepView) -> list[TrialView]:
    """The trials that count for TUNE.MAX_FAILED: that some values lead nowhere is what a sweep is to find out."""
    return [trial for trial in view.trials.values() if trial.state == "failed" and trial.why != DIVERGED]


class SweepMonitor(Callback, Stopper):
    """Writes down what Ray Tune's trials come to, shows it, and ends the sweep when that is wished.

    why:     why it ended before all trials had; "" if it did not
    failure: what to raise then, if it is one
    """

    def __init__(
        self, sweep: Sweep, trials: TrialsLeft, stop: threading.Event, mailbox: Mailbox, show: ShowSweep
    ) -> None:
        self._sweep, self._trials, self._stop, self._mailbox, self._show = sweep, trials, stop, mailbox, show
        self.why = ""
        self.failure: TrainingError | None = None
        self._failed_before = len(failures(sweep.before))

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune writes down who stops its trials; nothing reads it."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Told of each result before the scheduler is: what that makes of it comes after it in the ledger."""
        if "key" in result:
            self._sweep.add_result(int(trial_id), result)
        return False

    def stop_all(self) -> bool:
        """Asked by Ray Tune again and again; trials under way save their state and end."""
        if not self.why:
            self.why = self._why_to_stop()
            if self.why:
                self._mailbox.put("stop", self.why)
        return bool(self.why)

    def _why_to_stop(self) -> str:
        budget, view = self._sweep.cfg.TUNE.BUDGET, self._sweep.view
        if self.failure is not None:
            return "failure"
        if self._stop.is_set():
            return "signal"
        if not self._trials.are_left():
            return ""
        if budget.SECONDS is not None and view.elapsed_s(time.time()) >= budget.SECONDS:
            return "budget"
        if budget.EPOCHS is not None and sum(trial.trained for trial in view.trials.values()) >= budget.EPOCHS:
            return "budget"
        return ""

    def on_trial_start(self, iteration: int, trials: Any, trial: Trial, **info: Any) -> None:
        number = int(trial.trial_id)
        view = self._sweep.view.trials[number]
        if view.state != "running" and not self._sweep.is_over(number):
            self._sweep.note("start", trial=number, epoch=view.epoch)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Trial, **info: Any) -> None:
        number, result = int(trial.trial_id), trial.last_result or {}
        ended, epoch = result.get("ended"), result.get("epoch", 0)
        view = self._sweep.view.trials[number]
        state = view.state
        if ended == "failed":
            self._note_failure(number, view.epoch, result["error"], result.get("why"))
        elif ended == "done" and state != "done":
            self._sweep.note("done", trial=number, epoch=epoch)
        elif ended is None and state != "stopped":
            self._sweep.note("stopped", trial=number, epoch=epoch, why=self._sweep.cfg.TUNE.SCHEDULER)

    def on_trial_error(self, iteration: int, trials: Any, trial: Trial, **info: Any) -> None:
        epoch = (trial.last_result or {}).get("epoch", 0)
        self._note_failure(int(trial.trial_id), epoch, f"its process died {MAX_PROCESS_DEATHS + 1} times")

    def _note_failure(self, number: int, epoch: int, error: str, why: str | None = None) -> None:
        sweep = self._sweep
        logs = masked(sweep.folder.storage.path_of(f"{trial_folder(number)}/logs"))
        sweep.note("failed", trial=number, epoch=epoch, error=error, logs=logs, why=why)
        failed = failures(sweep.view)
        if len(failed) - self._failed_before > sweep.cfg.TUNE.MAX_FAILED:
            self.failure = TrainingError(
                f"{len(failed)} trials of this sweep failed (TUNE.MAX_FAILED {sweep.cfg.TUNE.MAX_FAILED}); the last, "
                f"trial {number}, said:\n{error}\nThe others are listed in {LEDGER}. The same command goes on"
            )

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._show(self._sweep.view, time.time())
