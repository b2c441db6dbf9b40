"""The sweep in Ray Tune: its loop over trials, what makes these, and what writes down what they come to."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray.tune
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.exceptions import RayActorError
from ray.tune import Callback, with_parameters, with_resources
from ray.tune.execution import class_cache, tune_controller
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.search.search_algorithm import SearchAlgorithm

from raytrain.cluster.mailbox import Mailbox
from raytrain.hash_seed import VARIABLE
from raytrain.sweep.monitor import SweepMonitor
from raytrain.sweep.preflight import TaskFacts
from raytrain.sweep.quota import Quota
from raytrain.sweep.resources import TrialResources
from raytrain.sweep.resumable import SchedulerSettings
from raytrain.sweep.schedulers import SYNCHRONOUS, build_scheduler
from raytrain.sweep.search import Observation, Search
from raytrain.sweep.space import objective, sweep_seed
from raytrain.sweep.sweep import Sweep
from raytrain.sweep.trial import DIVERGED, MAX_PROCESS_DEATHS, TrialActor, TrialSettings
from raytrain.training.environment import Environment
from raytrain.training.preflight import search_path

TUNES_FOLDER = "tune"  # what Ray Tune keeps for itself; a sweep is resumed from its ledger, so it goes with the launch


SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials have journals of their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has none
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # at first; then ResumableScheduler sets it
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "86400",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@contextlib.contextmanager
def actors_as_they_stand() -> Iterator[None]:
    """Ray Tune takes processes that stand already: it asks for a few variables, which they have from this process."""
    from ray.tune.execution import class_cache

    class AsTheyStand(class_cache._ActorClassCache):
        def get(self, trainable_class: Any) -> Any:
            return self._cache.setdefault(trainable_class, ray.remote(trainable_class))

    controller: Any = tune_controller
    kept = controller._ActorClassCache
    controller._ActorClassCache = AsTheyStand
    try:
        yield
    finally:
        controller._ActorClassCache = kept


def fit(
    sweep: Sweep,
    trials: TrialGenerator,
    monitor: SweepMonitor,
    launch: str,
    resources: TrialResources,
    task: TaskFacts,
    environment: Environment,
) -> None:
    """Ray Tune's part: returns once no trial is left, or none is wanted any more."""
    cfg, (metric, mode) = resources.settled(sweep.cfg), objective(sweep.cfg)
    cwd, (steps, datasets) = str(Path.cwd()), (task.steps_per_epoch, task.datasets)
    stand = cwd, search_path(), environment
    settings = TrialSettings(cfg, metric, mode, sweep.known, launch, steps, datasets, *stand)
    actor = with_resources(with_parameters(TrialActor, settings=settings), PlacementGroupFactory(resources.bundles))
    end = cfg.OPTIMIZATION.NUM_EPOCHS * (1 if cfg.TUNE.UNIT == "epoch" else task.steps_per_epoch)
    comparison = SchedulerSettings(cfg.TUNE.UNIT, end, mode, resources.concurrent, sweep_seed(cfg))
    with claims_on(resources, launch) as claims:
        ray.tune.run(  # not a Tuner: that pickles all it is given, for a resume that a ledger does better
            actor,
            name=TUNES_FOLDER,
            storage_path=sweep.folder.storage.path_of(""),
            search_alg=trials,
            scheduler=build_scheduler(cfg.TUNE, comparison, sweep),
            num_samples=trials.total,
            max_failures=MAX_PROCESS_DEATHS,
            reuse_actors=True,
            callbacks=[monitor, *claims],
            stop=monitor,
            verbose=0,
            raise_on_failed_trial=False,
        )


@contextlib.contextmanager
def claims_on(resources: TrialResources, launch: str) -> Iterator[list[Callback]]:
    """What is to be told of the trials, for elastic ones to share the cluster in the block; nothing for others."""
    if not resources.is_elastic:
        yield []
        return
    bounds = resources.least, resources.num_workers, resources.virtual_workers
    with Quota(Mailbox(launch), resources.per_worker, *bounds) as quota:
        yield [Claims(quota, resources.concurrent)]


class Claims(Callback):
    """Tells the quota of elastic trials which of them train, or are to begin as soon as there is room."""

    def __init__(self, quota: Quota, concurrent: int) -> None:
        self._quota, self._concurrent = quota, concurrent

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Those that pause keep their share: in a population they go on soon."""
        states = (Trial.RUNNING, Trial.PENDING, Trial.PAUSED)
        ranked = sorted((trial for trial in trials if trial.status in states), key=lambda t: states.index(t.status))
        self._quota.claim([int(trial.trial_id) for trial in ranked[: self._concurrent]])


class TrialController(TuneController):
    """Ray's loop over trials, which begins no more processes than have to be, and has none of them wait."""

    def _maybe_add_actors(self) -> None:
        """For every process that stands free: Ray makes a trial for one, then waits 0.1 s for what others tell."""
        super()._maybe_add_actors()
        while self._actor_cache.num_cached_objects:
            before = len(self._trials)
            self._maybe_update_trial_queue()
            if len(self._trials) == before:
                return
            super()._maybe_add_actors()

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        """Not for a trial whose own process starts already: Ray would end that, and begin another for the next trial.

        Where trials take less time than processes to start, none would ever stand but the first.
        """
        own = self._trial_to_actor.get(trial)
        if own in self._actor_manager._live_actors_to_ray_actors_resources and own not in self._started_actors:
            return False
        return bool(super()._maybe_reuse_cached_actor(trial))

    def _actor_failed(self, tracked_actor: TrackedActor, exception: Exception) -> None:
        """Its process may have died before a trial was given to it: to Ray it would be given for ever."""
        self._resetting_trials.discard(self._actor_to_trial[tracked_actor])
        super()._actor_failed(tracked_actor, exception)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        """Once for each death: of a process that dies as a trial is given to it Ray tells twice, and gives up then."""
        if trial.status != Trial.PENDING or not isinstance(exception, RayActorError):
            super()._trial_task_failure(trial, exception)


class TrialGenerator(SearchAlgorithm):
    """Makes the trials, number after number: those of earlier launches as they were, others as the search suggests."""

    def __init__(self, sweep: Sweep, search: Search, total: int, concurrent: int) -> None:
        self.total, self.next_number = total, 0
        self._sweep, self._search = sweep, search
        self._synchronous = sweep.cfg.TUNE.SCHEDULER in SYNCHRONOUS
        self._at_once = total if self._synchronous else concurrent
        self._live: set[int] = set()
        self._spec: dict[str, Any] = {}

    @property
    def total_samples(self) -> int:
        return self.total

    def add_configurations(self, experiments: Any) -> None:
        self._spec = experiments[0].spec

    def next_trial(self) -> Trial | None:
        while not self._finished and self.next_number < self.total:
            if len(self._live) >= self._at_once:
                return None
            number = self.next_number
            params = self._sweep.first_params.get(number) or self._search.params_of(number, self._observations(number))
            if params is None:  # the space is exhausted
                self.set_finished()
                return None
            self.next_number += 1
            self._sweep.add_trial(number, params)
            if self._sweep.is_over(number) and self._may_be_left_out(number):
                continue
            self._live.add(number)
            return self._trial(number, params)
        return None

    def are_left(self) -> bool:
        """Whether some trial has not come to its end, or is still to be made."""
        return self.next_number < self.total or bool(self._live)

    def _may_be_left_out(self, number: int) -> bool:
        """Whether no other trial is compared with it any more."""
        failed = self._sweep.before.trials[number].state == "failed"
        return self._sweep.cfg.TUNE.SCHEDULER == "none" or (
            failed and self._sweep.cfg.TUNE.SCHEDULER not in SYNCHRONOUS
        )

    def _observations(self, number: int) -> list[Observation]:
        """What the trials before it have come to; those that diverged, to no more than the worst of the others."""
        view, lineages = self._sweep.view, self._sweep.lineages
        bests = [trial.best for trial in view.trials.values() if trial.best is not None]
        worst = (min if view.mode == "max" else max)(bests, default=None)
        return [
            Observation(lineages[other].base, worst if trial.why == DIVERGED else trial.best)
            for other, trial in sorted(view.trials.items())
            if other < number
        ]

    def _trial(self, number: int, params: dict[str, Any]) -> Trial:
        spec = self._spec
        return Trial(
            spec["run"],
            config=dict(params),
            trial_id=f"{number:05d}",
            experiment_tag=f"{number:05d}",
            stopping_criterion=spec.get("stop", {}),
            checkpoint_config=spec["checkpoint_config"],
            max_failures=MAX_PROCESS_DEATHS,
            storage=spec["storage"],
        )

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self._live.discard(int(trial_id))

    def is_finished(self) -> bool:
        """Where trials pause, not before they have ended: Ray would keep no process for those that wait."""
        more = self.next_number < self.total or (self._synchronous and len(self._live) > 0)
        return self._finished or not more


@contextlib.contextmanager
def ray_tune_settings() -> Iterator[None]:
    """Ray Tune as a library: it prints nothing, catches no signal, writes no logs of its own, and keeps processes.

    It hands on the hash seed too, to trials on a cluster that was started elsewhere.
    """
    kept = {name: os.environ.get(name) for name in SETTINGS}
    controller = ray.tune.tune.TuneController
    ray.tune.tune.TuneController = TrialController  # type: ignore[misc]
    os.environ.update(SETTINGS)
    handed_on: set[str] = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", set())
    class_cache.ENV_VARS_TO_PROPAGATE = {*handed_on, VARIABLE}
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        class_cache.ENV_VARS_TO_PROPAGATE = handed_on
        ray.tune.tune.TuneController = controller  # type: ignore[misc]
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
