"""Ray's schedulers as a sweep has them: what was decided once stands, and each draws from what TUNE.SPACE says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.tune.experiment import Trial

from raytrain.config.distributions import distribution
from raytrain.sweep.resumable import SCORE, SchedulerSettings
from raytrain.sweep.schedulers import build_scheduler, mutation_of

pytestmark = pytest.mark.ray  # Ray Tune's import takes its time


class Once:
    """A sweep whose earlier launch let every trial go on."""

    def earlier_decision(self, number: int, epoch: int) -> str | None:
        return "CONTINUE"

    def add_clone(self, number: int, source: int, epoch: int, params: dict[str, Any]) -> None:
        raise AssertionError("no population")


def test_a_trial_that_median_once_let_go_on_goes_on_also_where_results_come_in_another_order() -> None:
    scheduler: Any = build_scheduler(
        SimpleNamespace(SCHEDULER="median", GRACE=1), SchedulerSettings("epoch", 9, "max", 4, 0), Once()
    )
    controller, trials = MagicMock(), []
    for number, score in enumerate((0.9, 0.8, 0.7, 0.6, 0.1)):
        trials.append(SimpleNamespace(trial_id=f"{number:05d}", status=Trial.RUNNING, runner_ip="", config={}))
        trials[-1] = type("T", (SimpleNamespace,), {"__hash__": object.__hash__})(**vars(trials[-1]))
        for epoch in (1, 2, 3):
            result = {"epoch": epoch, SCORE: score, "key": "k", "training_iteration": epoch}
            assert scheduler.on_trial_result(controller, trials[-1], result) == "CONTINUE"


def test_steps_and_options_are_mutated_to_those_beside_them() -> None:
    assert mutation_of(distribution({"quniform": [1, 9, 4]})) == [1, 5, 9]
    assert mutation_of(distribution({"quniform": [0.001, 0.005, 0.002]})) == [0.001, 0.003, 0.005]
    assert mutation_of(distribution({"randint": [2, 5]})) == [2, 3, 4]
    assert mutation_of(distribution({"choice": [None, 1.0]})) == [None, 1.0]
    assert mutation_of(distribution({"uniform": [0, 1]})).upper == 1.0
