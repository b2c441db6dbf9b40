"""Population based training, PBT and PB2: a generation is compared as a whole, and its worst trials clone its best.

Private parts of Ray are used where there are no public ones: when a generation is compared, and what a clone takes.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.utils.util import flatten_dict

from raytrain.sweep.lineage import RESUME_POINT, ResumePoint
from raytrain.sweep.resumable import ResumableScheduler


class ResumablePBT(ResumableScheduler):
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

    def _next_waiting(self, controller: Any, waiting: list[Trial]) -> Trial | None:
        """Clones first: a source that trains on removes its older checkpoints."""
        states: dict[Trial, Any] = self._trial_state  # type: ignore[attr-defined]
        due = [trial for trial in waiting if states[trial].last_train_time < self._generation]
        return min(due, key=lambda trial: (trial.trial_id not in self.clones, trial.trial_id), default=None)

    def _restarted(self, trial: Trial) -> None:
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
        resume_point = ResumePoint(
            of, self.sweep.add_clone(number, of, epoch, dict(trial.config)), epoch, own["seconds"]
        )
        taken: Any = trial.run_metadata.checkpoint_manager
        taken._latest_checkpoint_result = _TrainingResult(checkpoint_of(resume_point, trial, self._generation), result)


class ResumablePB2(ResumablePBT):
    """PB2: its model sees what trials came to in one order, whichever of them came first."""

    def _exploit(self, controller: Any, trial: Trial, source: Trial) -> None:
        self.data: Any = self.data.drop_duplicates()
        self.data = self.data.sort_values(["Time", "Trial", "Reward"], kind="stable").reset_index(drop=True)
        super()._exploit(controller, trial, source)


def wait_until_saved(controller: TuneController, trial: Trial) -> None:
    """Returns once its state is saved, or its process has died."""
    if trial.status != Trial.RUNNING:
        return
    saving: Any = trial.temporary_state.saving_to or controller._schedule_trial_save(trial)
    if saving is not None:
        with contextlib.suppress(RayError):
            ray.get(saving.future)


def checkpoint_of(resume_point: ResumePoint, trial: Trial, generation: int) -> Checkpoint:
    """For `trial` to go on from, in Ray Tune's folder."""
    assert trial.storage is not None
    files = trial.storage.storage_filesystem
    folder = f"{trial.storage.experiment_fs_path}/clones/{trial.trial_id}_{generation}"
    files.create_dir(folder, recursive=True)
    with files.open_output_stream(f"{folder}/{RESUME_POINT}") as stream:
        stream.write(resume_point.to_json())
    return Checkpoint(folder, files)
