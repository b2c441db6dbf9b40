"""What makes a scheduler of Ray's one that a sweep can resume: nothing is reported to it twice, its draws are keyed.

Private parts of Ray are used where there are no public ones: how many trials may begin, and in which processes.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raytrain.engine.randomness import keyed_seed
from raytrain.sweep.sweep import Sweep

SCORE = "score"  # in a trial's results: the metric, or where that is not finite the worst there is


@dataclasses.dataclass(frozen=True)
class SchedulerSettings:
    """What trials are compared by.

    unit:       "epoch" or "step", in which grace and perturb_every are counted
    end:        how far a trial goes, in units
    concurrent: trials at a time
    """

    unit: str
    end: int
    mode: str
    concurrent: int
    seed: int


class ResumableScheduler:
    """A scheduler of Ray's that a sweep can resume: mixed into its class.

    synchronous: its trials wait for each other: all are there from the start, and it may be reported the same twice
    """

    sweep: Sweep
    settings: SchedulerSettings
    asynchronous: bool
    synchronous: bool
    added: set[str]
    reported: set[tuple[str, str, int]]

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        if trial.trial_id in self.added:  # its process has died: to Ray it is a new one, at the end of all
            self._restarted(trial)
            return
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        if not self.added:  # of the processes of trials that end, or pause, at once Ray would keep one, not all
            controller._tune_controller._actor_cache.increase_max(
                trial.placement_group_factory, self.settings.concurrent
            )
        self.added.add(trial.trial_id)

    def _restarted(self, trial: Trial) -> None:
        """It goes on from its last checkpoint, and tells again what it has reported since."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number, place = int(trial.trial_id), (trial.trial_id, result["key"], result["epoch"])
        if place in self.reported and not self.synchronous:
            return TrialScheduler.CONTINUE
        self.reported.add(place)
        self._seed(number, result["epoch"])
        decision = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        if self.asynchronous:  # results came in another order then: what was decided stands
            decision = self.sweep.earlier_decision(number, result["epoch"]) or decision
        return str(decision)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if self.settings.unit in result and SCORE in result:
            super().on_trial_complete(controller, trial, result)  # type: ignore[misc]
        else:
            super().on_trial_remove(controller, trial)  # type: ignore[misc]

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        if not trial.should_recover():
            super().on_trial_error(controller, trial)  # type: ignore[misc]

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """None if as many run as may; Ray begins others that wait by itself, up to a number that is set here."""
        tune_controller = controller._tune_controller
        held = {*tune_controller._staged_trials, *tune_controller._trial_to_actor, *tune_controller._running_trials}
        free = max(0, self.settings.concurrent - len(held))
        waits = (Trial.PENDING, Trial.PAUSED)
        waiting = [trial for trial in controller.get_trials() if trial.status in waits and trial not in held]
        chosen = self._next_waiting(controller, waiting) if free and waiting else None
        # Only those are counted that need new processes: the next trials are chosen for the processes that wait.
        new = free if chosen is None else max(0, free - tune_controller._actor_cache.num_cached_objects)
        tune_controller._max_pending_trials = new + tune_controller._actor_manager.num_pending_actors
        return chosen

    def _next_waiting(self, controller: Any, waiting: list[Trial]) -> Trial | None:
        """Of the trials that wait, at least one, the next one."""
        return min(waiting, key=lambda trial: trial.status != Trial.PENDING)

    def _seed(self, number: int, epoch: int) -> None:
        """Ray draws from the generators that everyone uses."""
        seed = keyed_seed(self.settings.seed, "decision", number, epoch)
        random.seed(seed)
        np.random.seed(seed % 2**32)


class ResumableMedian(ResumableScheduler):
    """The median rule, which takes no result of a trial that it has once ended."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(controller, trial, result)
        if decision != TrialScheduler.STOP:
            self._stopped_trials.discard(trial)  # type: ignore[attr-defined]
        return decision


class ResumableHyperBand(ResumableScheduler):
    """HyperBand."""

    def _next_waiting(self, controller: Any, waiting: list[Trial]) -> Trial | None:
        chosen = super(ResumableScheduler, self).choose_trial_to_run(controller)  # type: ignore[misc]
        return chosen if chosen in waiting else None

    def _restarted(self, trial: Trial) -> None:
        bracket, _ = self._trial_info[trial]  # type: ignore[attr-defined]
        bracket._live_trials[trial] = None
