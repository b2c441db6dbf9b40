"""A sweep's trials in Ray Tune: where they train, what is suggested, what is watched."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune import Callback, Stopper, with_parameters, with_resources
from ray.tune.execution import tune_controller
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.search.search_algorithm import SearchAlgorithm

from raytrain.cluster import cluster
from raytrain.cluster.mailbox import Mailbox
from raytrain.config.load import with_values
from raytrain.config.sections import Config
from raytrain.errors import PreflightError, TrainingError, masked
from raytrain.sweep.ledger import LEDGER, SweepView, TrialView, trial_folder
from raytrain.sweep.preflight import Prospect
from raytrain.sweep.schedulers import POPULATIONS, Controller, Terms, build_scheduler
from raytrain.sweep.search import Search, Told
from raytrain.sweep.space import objective, sweep_seed, workers_of_trial
from raytrain.sweep.sweep import Sweep
from raytrain.sweep.trial import DIVERGED, Orders, TrialActor
from raytrain.training.preflight import search_path

TUNES_FOLDER = "tune"  # what Ray Tune keeps for itself; a sweep is resumed from its ledger, so it goes with the launch


DEATHS = 3  # restarts of a trial whose process has died


SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials have journals of their own
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has none
    "TUNE_MAX_PENDING_TRIALS_PG": "1000000",  # at first; then schedulers.Orderly sets it
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "86400",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
}


Show = Callable[[SweepView, float], None]  # and the time, in unix seconds


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


@dataclasses.dataclass(frozen=True)
class Places:
    """What a trial takes of the cluster, and how many do at a time."""

    num_workers: int
    use_gpu: bool
    per_worker: dict[str, float]
    concurrent: int

    @staticmethod
    def of(cfg: Config) -> Places:
        """PreflightError where the cluster cannot hold them."""
        _, use_gpu = cluster.resolve_workers(cfg.SCALE)
        num_workers, _ = workers_of_trial(cfg)
        per_worker = cluster.resources_per_worker(cfg.SCALE, use_gpu)
        cluster.check_resources(num_workers, per_worker)
        return Places(num_workers, use_gpu, per_worker, concurrency(cfg.TUNE.CONCURRENT, num_workers, per_worker))

    @property
    def bundles(self) -> list[dict[str, float]]:
        """A trial of one worker trains in its own process; several are others, beside one that takes nothing."""
        return [self.per_worker] if self.num_workers == 1 else [{}, *[self.per_worker] * self.num_workers]

    def settled(self, cfg: Config) -> Config:
        """What the config leaves open, as it is for each trial."""
        scale = {
            "NUM_WORKERS": self.num_workers if self.num_workers > 1 else 0,
            "VIRTUAL_WORKERS": workers_of_trial(cfg)[1],
            "USE_GPU": self.use_gpu,
        }
        return with_values(cfg, {f"SCALE.{key}": value for key, value in scale.items()})


def concurrency(wanted: int | None, num_workers: int, per_worker: dict[str, float]) -> int:
    """Trials at a time: as many as the cluster holds, or TUNE.CONCURRENT; PreflightError if it cannot hold those."""
    fitting = cluster.fitting_workers(per_worker) // num_workers
    if wanted is not None and wanted > fitting:
        each = f"{num_workers} workers" if num_workers > 1 else "one worker"
        raise PreflightError(
            f"TUNE.CONCURRENT is {wanted}, but this cluster can hold only {fitting} trials of {each} at a time; lower "
            "it, leave it out (as many as fit), or give each less (--set SCALE.CPUS_PER_WORKER 0.5)"
        )
    return wanted or fitting


def fit(sweep: Sweep, trials: Trials, watch: Watch, launch: str, places: Places, prospect: Prospect) -> None:
    """Ray Tune's part: returns once no trial is left, or none is wanted any more."""
    cfg, (metric, mode) = places.settled(sweep.cfg), objective(sweep.cfg)
    cwd, (steps, datasets) = str(Path.cwd()), (prospect.steps_per_epoch, prospect.datasets)
    orders = Orders(cfg, metric, mode, sweep.known, launch, steps, datasets, cwd, search_path())
    actor = with_resources(with_parameters(TrialActor, orders=orders), PlacementGroupFactory(places.bundles))
    end = cfg.OPTIMIZATION.NUM_EPOCHS * (1 if cfg.TUNE.UNIT == "epoch" else prospect.steps_per_epoch)
    terms = Terms(cfg.TUNE.UNIT, end, mode, places.concurrent, sweep_seed(cfg))
    ray.tune.run(  # not a Tuner: that pickles all it is given, for a resume that a ledger does better
        actor,
        name=TUNES_FOLDER,
        storage_path=sweep.folder.storage.path_of(""),
        search_alg=trials,
        scheduler=build_scheduler(cfg.TUNE, terms, sweep),
        num_samples=trials.total,
        max_failures=DEATHS,
        reuse_actors=True,
        callbacks=[watch],
        stop=watch,
        verbose=0,
        raise_on_failed_trial=False,
    )


class Trials(SearchAlgorithm):
    """Makes the trials, number after number: those of earlier launches as they were, others as the search suggests."""

    def __init__(self, sweep: Sweep, search: Search, total: int, concurrent: int) -> None:
        self.total, self.next_number = total, 0
        self._sweep, self._search = sweep, search
        self._pauses = sweep.cfg.TUNE.SCHEDULER in POPULATIONS
        self._at_once = total if self._pauses else concurrent
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
            params = self._sweep.begun.get(number) or self._search.params_of(number, self._told(number))
            if params is None:  # the space is exhausted
                self.set_finished()
                return None
            self.next_number += 1
            self._sweep.made(number, params)
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
            failed and self._sweep.cfg.TUNE.SCHEDULER not in POPULATIONS
        )

    def _told(self, number: int) -> list[Told]:
        """What the trials before it have come to; those that diverged, to no more than the worst of the others."""
        view, lineages = self._sweep.view, self._sweep.lineages
        bests = [trial.best for trial in view.trials.values() if trial.best is not None]
        worst = (min if view.mode == "max" else max)(bests, default=None)
        return [
            Told(lineages[other].base, worst if trial.why == DIVERGED else trial.best)
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
            max_failures=DEATHS,
            storage=spec["storage"],
        )

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self._live.discard(int(trial_id))

    def is_finished(self) -> bool:
        """Where trials pause, not before they have ended: Ray would keep no process for those that wait."""
        more = self.next_number < self.total or (self._pauses and len(self._live) > 0)
        return self._finished or not more


def failures(view: SweepView) -> list[TrialView]:
    """The trials that count for TUNE.MAX_FAILED: that some values lead nowhere is what a sweep is to find out."""
    return [trial for trial in view.trials.values() if trial.state == "failed" and trial.why != DIVERGED]


class Watch(Callback, Stopper):
    """Writes down what Ray Tune's trials come to, shows it, and ends the sweep when that is wished.

    why:     why it ended before all trials had; "" if it did not
    failure: what to raise then, if it is one
    """

    def __init__(self, sweep: Sweep, trials: Trials, stop: threading.Event, mailbox: Mailbox, show: Show) -> None:
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
            self._sweep.measured(int(trial_id), result)
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
        self._note_failure(int(trial.trial_id), epoch, f"its process died {DEATHS + 1} times")

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


@contextlib.contextmanager
def ray_tune_settings() -> Iterator[None]:
    """Ray Tune as a library: it prints nothing, catches no signal, writes no logs of its own, and keeps processes."""
    kept = {name: os.environ.get(name) for name in SETTINGS}
    controller = ray.tune.tune.TuneController
    ray.tune.tune.TuneController = Controller  # type: ignore[misc]
    os.environ.update(SETTINGS)
    log = logging.getLogger("ray.tune")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        ray.tune.tune.TuneController = controller  # type: ignore[misc]
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
