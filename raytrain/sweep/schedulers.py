"""Ray Tune's schedulers for a sweep: no result is told to them twice, and what they draw is keyed by a seed.

Private parts of Ray are used where there are no public ones: how many trials may begin, in which processes, and what
a PBT exploits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import warnings
from typing import Any, Protocol

import numpy as np
import ray
from ray import tune
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.exceptions import RayActorError, RayError
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.utils.util import flatten_dict

from raytrain.config.distributions import Distribution, Range
from raytrain.engine.randomness import keyed_seed
from raytrain.sweep.lineage import STANDING, Lineage, Standing
from raytrain.sweep.space import Space

SCORE = "score"  # in a trial's results: the metric, or where that is not finite the worst there is
POPULATIONS = ("hyperband", "pbt", "pb2")  # compare trials that have come equally far: all have to be there at first
BY_ARRIVAL = ("asha", "median")  # compare a trial with those that came as far before it


class Past(Protocol):
    """What is known of the sweep's earlier launches, and told of this one."""

    def decided(self, number: int, epoch: int) -> str | None:
        """What was decided for the trial after its result of `epoch`; None where nothing was yet."""

    def cloned(self, number: int, source: int, epoch: int, params: dict[str, Any]) -> Lineage:
        """Trial `number` goes on from what `source` was after `epoch`, with these params; the source's lineage."""


@dataclasses.dataclass(frozen=True)
class Terms:
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


class Controller(TuneController):
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


class Orderly:
    """A scheduler of Ray's that a sweep can resume: mixed into its class.

    pauses: its trials wait for each other: all are there from the start, and it may be told the same twice
    """

    past: Past
    terms: Terms
    by_arrival: bool
    pauses: bool
    added: set[str]
    told: set[tuple[str, str, int]]

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        if trial.trial_id in self.added:  # its process has died: to Ray it is a new one, at the end of all
            self._came_back(trial)
            return
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        if not self.added:  # of the processes of trials that end, or pause, at once Ray would keep one, not all
            controller._tune_controller._actor_cache.increase_max(trial.placement_group_factory, self.terms.concurrent)
        self.added.add(trial.trial_id)

    def _came_back(self, trial: Trial) -> None:
        """It goes on from its last checkpoint, and tells again what it has told since."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number, place = int(trial.trial_id), (trial.trial_id, result["key"], result["epoch"])
        if place in self.told and not self.pauses:
            return TrialScheduler.CONTINUE
        self.told.add(place)
        self._seed(number, result["epoch"])
        decision = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        if self.by_arrival:  # results came in another order then: what was decided stands
            decision = self.past.decided(number, result["epoch"]) or decision
        return str(decision)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if self.terms.unit in result and SCORE in result:
            super().on_trial_complete(controller, trial, result)  # type: ignore[misc]
        else:
            super().on_trial_remove(controller, trial)  # type: ignore[misc]

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        if not trial.should_recover():
            super().on_trial_error(controller, trial)  # type: ignore[misc]

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        """None if as many run as may; Ray begins others that wait by itself, up to a number that is set here."""
        inner = controller._tune_controller
        held = {*inner._staged_trials, *inner._trial_to_actor, *inner._running_trials}
        free = max(0, self.terms.concurrent - len(held))
        waits = (Trial.PENDING, Trial.PAUSED)
        waiting = [trial for trial in controller.get_trials() if trial.status in waits and trial not in held]
        chosen = self._choice(controller, waiting) if free and waiting else None
        # Only those are counted that need new processes: the next trials are chosen for the processes that wait.
        new = free if chosen is None else max(0, free - inner._actor_cache.num_cached_objects)
        inner._max_pending_trials = new + inner._actor_manager.num_pending_actors
        return chosen

    def _choice(self, controller: Any, waiting: list[Trial]) -> Trial | None:
        """Of the trials that wait, at least one, the next one."""
        return min(waiting, key=lambda trial: trial.status != Trial.PENDING)

    def _seed(self, number: int, epoch: int) -> None:
        """Ray draws from the generators that everyone uses."""
        seed = keyed_seed(self.terms.seed, "decision", number, epoch)
        random.seed(seed)
        np.random.seed(seed % 2**32)


class Median(Orderly):
    """The median rule, which takes no result of a trial that it has once ended."""

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(controller, trial, result)
        if decision != TrialScheduler.STOP:
            self._stopped_trials.discard(trial)  # type: ignore[attr-defined]
        return decision


class Brackets(Orderly):
    """HyperBand."""

    def _choice(self, controller: Any, waiting: list[Trial]) -> Trial | None:
        chosen = super(Orderly, self).choose_trial_to_run(controller)  # type: ignore[misc]
        return chosen if chosen in waiting else None

    def _came_back(self, trial: Trial) -> None:
        bracket, _ = self._trial_info[trial]  # type: ignore[attr-defined]
        bracket._live_trials[trial] = None


class Population(Orderly):
    """PBT and PB2, synchronous: a generation is compared when all of it has come as far.

    clones: trials that have yet to take their source's checkpoint over
    """

    clones: set[str]

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self.clones.discard(trial.trial_id)
        decision = super().on_trial_result(controller, trial, result)
        self._move_on()
        return decision

    def _move_on(self) -> None:
        """To a generation after the last one: where results are rarer than it asks, Ray's would be that one again."""
        states: dict[Trial, Any] = self._trial_state  # type: ignore[attr-defined]
        last = max(state.last_perturbation_time for state in states.values())
        self._next_perturbation_sync = max(self._generation, last + 1)

    def _choice(self, controller: Any, waiting: list[Trial]) -> Trial | None:
        """Clones first: a source that trains on removes its older checkpoints."""
        states: dict[Trial, Any] = self._trial_state  # type: ignore[attr-defined]
        due = [trial for trial in waiting if states[trial].last_train_time < self._generation]
        return min(due, key=lambda trial: (trial.trial_id not in self.clones, trial.trial_id), default=None)

    def _came_back(self, trial: Trial) -> None:
        state: Any = self._trial_state[trial]  # type: ignore[attr-defined]
        state.last_train_time = state.last_perturbation_time

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._let_the_others_go_on(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        if not trial.should_recover():
            self._let_the_others_go_on(controller, trial)

    def _let_the_others_go_on(self, controller: Any, ended: Trial) -> None:
        """Those that wait for one that has ended before it came as far (Ray would let them wait for ever)."""
        live = [trial for trial in controller.get_live_trials() if trial is not ended and not trial.is_finished()]
        waiting = [trial for trial in live if trial.status == Trial.PAUSED]
        states: dict[Trial, Any] = self._trial_state  # type: ignore[attr-defined]
        states[ended].last_score = None  # it is compared no more; to Ray it still lives
        states[ended].last_train_time = max(states[ended].last_train_time, self._generation)
        if waiting and all(states[trial].last_train_time >= self._generation for trial in live):
            last = min(waiting, key=lambda trial: trial.trial_id)
            states[last].last_perturbation_time = float("-inf")
            PopulationBasedTraining.on_trial_result(self, controller, last, flatten_dict(last.last_result))  # type: ignore[arg-type]
            self._move_on()

    @property
    def _generation(self) -> int:
        """At how many units the next comparison is."""
        return int(self._next_perturbation_sync)

    def _checkpoint_or_exploit(self, trial: Trial, controller: Any, best: list[Trial], worst: list[Trial]) -> None:
        """Ray clones none whose process dies while it saves, and has those that save already save a second time."""
        if trial not in worst:
            return
        self._seed(int(trial.trial_id), self._generation)  # which one it is to become
        source = random.choice(best)
        wait_until_saved(controller, source)
        self._exploit(controller, trial, source)

    def _exploit(self, controller: Any, trial: Trial, source: Trial) -> None:
        self._seed(int(trial.trial_id), -self._generation)  # with which params
        with warnings.catch_warnings():  # of PB2's Gaussian process on how well it fits, in the middle of the table
            warnings.simplefilter("ignore")
            super()._exploit(controller, trial, source)  # type: ignore[misc]
        self.clones.add(trial.trial_id)
        own, result = (self._trial_state[each].last_result for each in (trial, source))  # type: ignore[attr-defined]
        number, of, epoch = int(trial.trial_id), int(source.trial_id), result["epoch"]
        standing = Standing(of, self.past.cloned(number, of, epoch, dict(trial.config)), epoch, own["seconds"])
        taken: Any = trial.run_metadata.checkpoint_manager
        taken._latest_checkpoint_result = _TrainingResult(checkpoint_of(standing, trial, self._generation), result)


def wait_until_saved(controller: TuneController, trial: Trial) -> None:
    """Returns once its state is saved, or its process has died."""
    if trial.status != Trial.RUNNING:
        return
    saving: Any = trial.temporary_state.saving_to or controller._schedule_trial_save(trial)
    if saving is not None:
        with contextlib.suppress(RayError):
            ray.get(saving.future)


def checkpoint_of(standing: Standing, trial: Trial, generation: int) -> Checkpoint:
    """For `trial` to go on from, in Ray Tune's folder."""
    assert trial.storage is not None
    files = trial.storage.storage_filesystem
    folder = f"{trial.storage.experiment_fs_path}/clones/{trial.trial_id}_{generation}"
    files.create_dir(folder, recursive=True)
    with files.open_output_stream(f"{folder}/{STANDING}") as stream:
        stream.write(standing.to_json())
    return Checkpoint(folder, files)


class BayesianPopulation(Population):
    """PB2: its model sees what trials came to in one order, whichever of them came first."""

    def _exploit(self, controller: Any, trial: Trial, source: Trial) -> None:
        self.data: Any = self.data.drop_duplicates()
        self.data = self.data.sort_values(["Time", "Trial", "Reward"], kind="stable").reset_index(drop=True)
        super()._exploit(controller, trial, source)


def build_scheduler(tune_cfg: Any, terms: Terms, past: Past) -> TrialScheduler:
    """The one that TUNE asks for, with `Orderly` mixed in."""
    made: Any = MAKERS[tune_cfg.SCHEDULER](tune_cfg, terms)
    made.past, made.terms = past, terms
    made.by_arrival, made.pauses = tune_cfg.SCHEDULER in BY_ARRIVAL, tune_cfg.SCHEDULER in POPULATIONS
    made.added, made.told, made.clones = set(), set(), set()
    return made


def orderly(kind: type, mixin: type = Orderly) -> Any:
    return type(kind.__name__, (mixin, kind), {})


def _none(tune_cfg: Any, terms: Terms) -> Any:
    return orderly(FIFOScheduler)()


def _asha(tune_cfg: Any, terms: Terms) -> Any:
    return orderly(AsyncHyperBandScheduler)(
        time_attr=terms.unit,
        metric=SCORE,
        mode=terms.mode,
        max_t=terms.end,
        grace_period=min(tune_cfg.GRACE, terms.end),
        reduction_factor=tune_cfg.REDUCTION,
        stop_last_trials=False,
    )


def _hyperband(tune_cfg: Any, terms: Terms) -> Any:
    return orderly(HyperBandScheduler, Brackets)(
        time_attr=terms.unit,
        metric=SCORE,
        mode=terms.mode,
        max_t=terms.end,
        reduction_factor=tune_cfg.REDUCTION,
        stop_last_trials=False,
    )


def _median(tune_cfg: Any, terms: Terms) -> Any:
    return orderly(MedianStoppingRule, Median)(
        time_attr=terms.unit, metric=SCORE, mode=terms.mode, grace_period=tune_cfg.GRACE, min_samples_required=3
    )


def _pbt(tune_cfg: Any, terms: Terms) -> Any:
    space = Space.of(tune_cfg).entries

    def within(params: dict[str, Any]) -> dict[str, Any]:
        """A perturbed value stays within its range."""
        for key, drawn in space.items():
            if isinstance(drawn, Range):
                params[key] = min(max(params[key], drawn.low), drawn.high)
        return params

    return orderly(PopulationBasedTraining, Population)(
        time_attr=terms.unit,
        metric=SCORE,
        mode=terms.mode,
        perturbation_interval=tune_cfg.PERTURB_EVERY,
        hyperparam_mutations={key: mutation_of(drawn) for key, drawn in space.items()},
        quantile_fraction=tune_cfg.QUANTILE,
        resample_probability=tune_cfg.RESAMPLE,
        custom_explore_fn=within,
        log_config=False,
        synch=True,
    )


def mutation_of(drawn: Distribution) -> Any:
    """A distribution of TUNE.SPACE as Ray's PBT takes it; of steps and options those beside one are next to it."""
    if isinstance(drawn, Range):
        return (tune.loguniform if drawn.log else tune.uniform)(drawn.low, drawn.high)
    return [drawn.at(index) for index in range(drawn.size)]


def _pb2(tune_cfg: Any, terms: Terms) -> Any:
    from ray.tune.schedulers.pb2 import PB2

    bounds = {key: list(next(iter(dict(entry).values())))[:2] for key, entry in tune_cfg.SPACE.items()}
    return orderly(PB2, BayesianPopulation)(
        time_attr=terms.unit,
        metric=SCORE,
        mode=terms.mode,
        perturbation_interval=tune_cfg.PERTURB_EVERY,
        hyperparam_bounds=bounds,
        quantile_fraction=tune_cfg.QUANTILE,
        log_config=False,
        synch=True,
    )


MAKERS = {"none": _none, "asha": _asha, "hyperband": _hyperband, "median": _median, "pbt": _pbt, "pb2": _pb2}
