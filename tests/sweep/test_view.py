"""A sweep is seen from its ledger as it went."""

from __future__ import annotations

import time
from typing import Any

from ledger_records import SWEEP, of, result, trial

from raytrain.sweep.view import SweepView, view_of


def view(*records: dict[str, Any]) -> SweepView:
    return view_of([SWEEP, *records])


def test_a_trial_has_the_state_of_its_newest_record() -> None:
    seen = view(
        *map(trial, range(5)),
        of("start", 1, 0),
        result(2, 3, 0.5),
        of("stopped", 2, 3, why="asha"),
        of("done", 3, 9),
        of("failed", 4, 2, error="out of memory", logs="trial_0004/logs"),
    )
    assert [t.state for t in seen.trials.values()] == ["waiting", "running", "stopped", "done", "failed"]
    assert seen.counts() == {"running": 1, "done": 1, "stopped": 1, "failed": 1, "waiting": 1}
    assert seen.trials[2].why == "asha"
    assert (seen.trials[4].error, seen.trials[4].logs) == ("out of memory", "trial_0004/logs")
    assert seen.num_samples == 5
    seen.add(of("start", 4, 2))
    assert (seen.trials[4].state, seen.trials[4].error) == ("running", None)
    seen.add({**SWEEP, "time": 200.0})  # the launch was killed, and its trials with it
    assert seen.trials[1].state == seen.trials[4].state == "waiting"


def test_what_a_killed_trial_measures_again_counts_once_and_its_work_twice() -> None:
    seen = view(trial(0), of("start", 0, 0), *(result(0, e, v) for e, v in ((1, 0.5), (2, 0.9), (3, 0.7))))
    assert (seen.trials[0].best, seen.trials[0].best_epoch) == (0.9, 2)
    seen.add(of("start", 0, 1))
    assert seen.trials[0].curve == [(1, 10, 0.5)]
    assert (seen.trials[0].epoch, seen.trials[0].best) == (1, 0.5)
    seen.add(result(0, 2, 0.6))
    assert seen.trials[0].curve == [(1, 10, 0.5), (2, 20, 0.6)]
    assert seen.trials[0].trained == 4


def test_a_clone_keeps_its_own_curve_but_its_best_is_of_the_weights_it_has_now() -> None:
    seen = view(trial(0), *(result(0, e, v) for e, v in ((1, 0.8), (2, 0.3), (3, 0.2))))
    phases = [{"FROM_EPOCH": 2, "LR": 0.02}]
    seen.add(of("clone", 0, 2, **{"from": 1, "params": {"OPTIMIZATION.LR": 0.02}, "config_phases": phases}))
    clone = seen.trials[0]
    assert clone.curve == [(1, 10, 0.8), (2, 20, 0.3)]
    assert (clone.epoch, clone.best, clone.params["OPTIMIZATION.LR"]) == (2, None, 0.02)
    seen.add(result(0, 3, 0.7))
    assert (clone.best, clone.best_epoch, clone.clones, clone.phases) == (0.7, 3, [(2, 1)], phases)
    assert [(epoch, params["OPTIMIZATION.LR"]) for epoch, params in clone.history] == [(0, 0.01), (2, 0.02)]
    assert clone.trained == 4


def test_a_sweep_of_many_epochs_is_read_in_time_that_grows_with_them() -> None:
    def read_s(epochs: int) -> float:
        records = [SWEEP, trial(0), *(result(0, epoch, 1 / epoch) for epoch in range(1, epochs + 1))]
        began = time.process_time()
        assert view_of(records).trials[0].best_epoch == 1
        return time.process_time() - began

    assert min(read_s(20_000) for _ in range(3)) < 40 * min(read_s(1_000) for _ in range(3)), "400 where it is squared"


def test_the_best_is_by_the_mode_and_of_equals_the_first() -> None:
    records = [trial(0), trial(1), trial(2), trial(3), result(2, 1, 0.5), result(1, 1, 0.5), result(0, 1, 0.3)]
    assert [t.number for t in view(*records).ranked()] == [1, 2, 0, 3]
    least = view_of([{**SWEEP, "mode": "min"}, *records])
    assert [t.number for t in least.ranked()] == [0, 1, 2, 3]
    assert view(trial(0)).best is None


def test_the_time_of_a_sweep_is_the_sum_of_its_launches() -> None:
    seen = view(trial(0), result(0, 8, 0.5))  # killed at 110
    assert seen.elapsed_s() == 10.0
    assert seen.elapsed_s(now=130.0) == 30.0
    seen.add({**SWEEP, "time": 1000.0})
    seen.add({"kind": "end", "time": 1005.0, "status": "finished", "best": 0, "value": 0.5, "seconds": 5.0})
    assert seen.elapsed_s(now=2000.0) == 15.0
