"""What sweep/ assumes of Ray Tune's private parts: a new version of Ray fails here, and says which module to look at.

None of these is gated by a version, as those of cluster/ are: where one fails, sweeps do not run as they should.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import ray.tune.tune
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution._internal.tracked_actor import TrackedActor
from ray.train._internal.checkpoint_manager import _CheckpointManager
from ray.train._internal.session import _TrainingResult
from ray.train._internal.storage import StorageContext
from ray.tune.execution import class_cache, tune_controller
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.experiment.trial import _TemporaryTrialState
from ray.tune.schedulers import (
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
    hyperband,
)
from ray.tune.schedulers.pb2 import PB2
from ray.tune.schedulers.pbt import _PBTTrialState
from ray.tune.search.search_algorithm import SearchAlgorithm
from ray_contract import Dependent

from raytrain.sweep.ray_tune import SETTINGS

TUNE = Dependent("sweep/ray_tune.py")
RESUMABLE = Dependent("sweep/resumable.py")
POPULATION = Dependent("sweep/population.py")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_settings_in_the_environment(name: str) -> None:
    package = Path(ray.__file__).parent
    modules = ("tune/constants.py", "tune/execution/experiment_state.py", "air/constants.py")
    known = any(f'"{name}"' in (package / module).read_text() for module in modules)
    TUNE.holds(known, "it has Tune be a library: no output, no logs, no handlers", f"nobody reads {name}")


def test_the_loop_over_trials() -> None:
    why = "it puts its own controller in the place of Tune's"
    TUNE.mentions(ray.tune.tune.run, why, "TuneController(**runner_kwargs)")
    why = "trials are begun by as few processes as can be"
    for method in ("_maybe_add_actors", "_maybe_update_trial_queue"):
        TUNE.overrides(getattr(TuneController, method), why, "self")
    TUNE.overrides(TuneController._maybe_reuse_cached_actor, why, "self", "trial")
    RESUMABLE.mentions(TuneController._maybe_update_trial_queue, why, "self._max_pending_trials")
    RESUMABLE.mentions(TuneController._maybe_add_actors, why, "num_pending_actors >= self._max_pending_trials")
    attributes = ("_actor_cache", "_actor_manager", "_trials", "_trial_to_actor", "_actor_to_trial", "_started_actors")
    TUNE.has(TuneController, why, *attributes)
    RESUMABLE.has(TuneController, why, "_staged_trials", "_running_trials", "_trial_to_actor", "_max_pending_trials")
    TUNE.has(RayActorManager, why, "_live_actors_to_ray_actors_resources", "num_pending_actors")
    cache = tune_controller._ObjectCache
    TUNE.has(cache, why, "num_cached_objects")
    RESUMABLE.calls(cache.increase_max, why, ..., "key", 2)


def test_what_becomes_of_trials_whose_process_dies() -> None:
    why = "a trial whose process dies begins again once, with its state"
    TUNE.overrides(TuneController._actor_failed, why, "self", "tracked_actor", "exception")
    TUNE.overrides(TuneController._trial_task_failure, why, "self", "trial", "exception")
    TUNE.has(TuneController, why, "_resetting_trials")
    TUNE.has(Trial, why, "PENDING", "PAUSED", "RUNNING", "should_recover", "temporary_state", "run_metadata")
    TUNE.holds(isinstance(TrackedActor, type), why, "what stands for a process")


def test_the_processes_of_trials() -> None:
    why = "trials take processes that stand already"
    TUNE.overrides(class_cache._ActorClassCache.get, why, "self", "trainable_cls")
    TUNE.replaces(class_cache._ActorClassCache.get, why, "9164951bf277")
    TUNE.has(class_cache._ActorClassCache, why, "_cache")
    TUNE.mentions(TuneController, why, "_ActorClassCache()")
    TUNE.has(tune_controller, why, "_ActorClassCache")
    why = "it hands the hash seed on to trials on a cluster that was started elsewhere"
    TUNE.has(class_cache, why, "ENV_VARS_TO_PROPAGATE")
    TUNE.mentions(class_cache._ActorClassCache.get, why, "in ENV_VARS_TO_PROPAGATE", "= os.environ[")


def test_the_makers_of_trials() -> None:
    why = "it makes the trials of a sweep itself, each under its number"
    names = (
        "config",
        "trial_id",
        "experiment_tag",
        "stopping_criterion",
        "checkpoint_config",
        "max_failures",
        "storage",
    )
    TUNE.calls(Trial, why, "trainable", **dict.fromkeys(names))
    methods = ("add_configurations", "next_trial", "on_trial_complete", "is_finished", "set_finished", "total_samples")
    TUNE.has(SearchAlgorithm, why, *methods)
    TUNE.has(SearchAlgorithm, why, "_finished")
    POPULATION.has(StorageContext, "clones begin from what it writes there", "storage_filesystem", "experiment_fs_path")


def test_what_schedulers_are_told_through() -> None:
    why = "schedulers look at which trials run, and set how many may"
    RESUMABLE.has(tune_controller.TrialRunnerWrapper, why, "_tune_controller")
    methods = ("on_trial_add", "on_trial_result", "on_trial_complete", "on_trial_error", "on_trial_remove")
    RESUMABLE.has(TrialScheduler, why, *methods, "choose_trial_to_run", "CONTINUE", "PAUSE", "STOP")
    POPULATION.calls(TuneController._schedule_trial_save, "a clone waits for the state of its source", ..., None)
    POPULATION.has(_TemporaryTrialState, "a clone waits for the state of its source", "saving_to")


def test_the_state_of_hyperband_and_of_the_median_rule() -> None:
    RESUMABLE.has(HyperBandScheduler, "a trial that has died comes back into its bracket", "_trial_info")
    RESUMABLE.has(hyperband._Bracket, "a trial that has died comes back into its bracket", "_live_trials")
    RESUMABLE.has(MedianStoppingRule, "a trial that goes on is none that was ended", "_stopped_trials")


def test_the_state_of_populations() -> None:
    why = "a generation is compared once all of it has come as far, whoever died"
    POPULATION.has(PopulationBasedTraining, why, "_trial_state", "_next_perturbation_sync")
    POPULATION.has(_PBTTrialState, why, "last_score", "last_perturbation_time", "last_train_time", "last_result")
    population = PopulationBasedTraining
    POPULATION.overrides(
        population._checkpoint_or_exploit, why, "self", "trial", "tune_controller", "upper_quantile", "lower_quantile"
    )
    POPULATION.replaces(population._checkpoint_or_exploit, why, "13e1c92353c4")
    POPULATION.overrides(population._exploit, why, "self", "tune_controller", "trial", "trial_to_clone")
    why = "a clone takes a checkpoint over that its source has written"
    POPULATION.mentions(population._exploit, why, "checkpoint_manager._latest_checkpoint_result")
    POPULATION.has(_CheckpointManager, why, "_latest_checkpoint_result")
    POPULATION.calls(_TrainingResult, why, None, {})
    why = "what PB2's model sees is put into one order"
    POPULATION.has(PB2, why, "data")
    POPULATION.mentions(PB2, why, '"Trial", "Time"', '"Reward"')
