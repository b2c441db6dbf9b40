"""Sweeps that are killed or stopped at any moment: the same command goes on, and comes to the same."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands import alive, family, terminate_all, wait_for
from ray.tune.experiment import Trial
from ray_nodes import ray_nodes
from runs import Run
from sweeps import (
    EPOCHS,
    PBT,
    Undisturbed,
    actors,
    assert_whole,
    count,
    journals,
    ledger,
    started,
    sweep,
    swept,
    told,
    under,
)

from raytrain.sweep import population, ray_tune
from raytrain.sweep.ledger import trial_folder
from raytrain.sweep.trial import TrialActor
from raytrain.sweep.view import view_of

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("scheduler", ["none", "hyperband", "pbt"])
def test_a_sweep_whose_driver_is_killed_goes_on_and_trains_no_result_twice(
    scheduler: str, tmp_path: Path, undisturbed_sweep: Undisturbed
) -> None:
    run = sweep(tmp_path, under(scheduler))
    (run.gate / "slow").write_text("0.03")
    launched = started(run)
    if scheduler == "none":
        wait_for(lambda: count(run, "done"), "a trial that is done")
    else:
        wait_for(
            lambda: any(len(records) > 1 for records in told(run, "result").values()), "a second result of a trial"
        )
    run.hold(0)
    pids = wait_for(lambda: [int(path.name[5:]) for path in run.gate.glob("held-*")], "a trial in mid-epoch")
    launched.kill(pids)
    (run.gate / "slow").unlink()
    run.release()
    before = view_of(ledger(run))
    kept = journals(run, before)
    assert swept(run).status == "finished"
    expected = told(undisturbed_sweep(scheduler), "trial", "result", "clone")
    assert told(run, "trial", "result", "clone") == expected
    assert {number: journals(run, view_of(ledger(run)))[number] for number in kept} == kept
    assert_whole(run, view_of(ledger(run)))


@pytest.mark.parametrize("scheduler", ["none", "pbt"])
def test_a_trial_whose_process_is_killed_goes_on_from_its_state(
    scheduler: str, tmp_path: Path, undisturbed_sweep: Undisturbed
) -> None:
    run = sweep(tmp_path, under(scheduler))
    run.hold(26)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(swept, run)
        os.kill(held(run, ending), signal.SIGKILL)
        run.release()
        view = ending.result().view
    assert told(run, "trial", "result", "clone") == told(undisturbed_sweep(scheduler), "trial", "result", "clone")
    uses = [line.split()[0] for line in (run.gate / "uses.txt").read_text().splitlines()]
    assert uses.count("0") == 4, uses.count("0")  # none has begun anew
    assert_whole(run, view)


def test_a_clone_that_is_killed_is_the_same_clone_again_though_its_source_has_gone_on(
    tmp_path: Path, undisturbed_sweep: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_to_pause(monkeypatch)
    run = sweep(tmp_path, {**PBT, "CONCURRENT": 3}, TASK="tasks_for_tests:HeldClones")
    run.hold(15)
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(swept, run)
        pid = held(run, ending)
        wait_for(lambda: sum(map(len, told(run, "result").values())) == 6, "the second results of those that are none")
        os.kill(pid, signal.SIGKILL)
        run.release()
        view = ending.result().view
    assert told(run, "trial", "result", "clone") == told(undisturbed_sweep("pbt"), "trial", "result", "clone")
    assert_whole(run, view)


def test_a_trial_whose_process_is_killed_as_it_saves_is_cloned_all_the_same(
    tmp_path: Path, undisturbed_sweep: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_to_pause(monkeypatch)
    waits, killed = population.wait_until_saved, []

    def kill_and_wait(controller: Any, trial: Trial) -> None:
        if trial.status == Trial.RUNNING and not killed:
            lock = run.run_dir / trial_folder(int(trial.trial_id)) / ".lock"
            killed.append(int(lock.read_text().split()[1]))
            os.kill(killed[0], signal.SIGKILL)
        waits(controller, trial)

    monkeypatch.setattr(population, "wait_until_saved", kill_and_wait)
    run = sweep(tmp_path, PBT)
    view = swept(run).view
    assert killed
    assert told(run, "trial", "result", "clone") == told(undisturbed_sweep("pbt"), "trial", "result", "clone")
    assert_whole(run, view)


def test_a_signal_during_the_first_look_at_the_task_ends_the_sweep_before_any_trial(tmp_path: Path) -> None:
    run = sweep(tmp_path)
    (run.gate / "building").touch()
    launched = started(run)
    wait_for((run.gate / "builds").exists, "the task, which builds its data")
    time.sleep(3)  # Ray connects meanwhile, in a thread
    below = set(family(launched.pid))
    os.kill(launched.pid, signal.SIGTERM)
    (run.gate / "building").unlink()
    said = launched.ended(75)
    assert "the same command goes on" in said and "SIGTERM received" not in said
    assert not count(run, "result")
    wait_for(lambda: not any(map(alive, below)), "the end of all its processes")


def test_a_process_that_is_killed_while_it_waits_for_a_trial_is_replaced(tmp_path: Path, ray_address: str) -> None:
    run, undisturbed = (
        sweep(tmp_path / name, {**PBT, "NUM_SAMPLES": 3}, **{"OPTIMIZATION.NUM_EPOCHS": 2}) for name in ("one", "other")
    )
    (run.gate / "slow").write_text("0.1")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(swept, run)
        wait_for(lambda: count(run, "result") == 2, "two results")
        run.hold(0)
        busy = held(run, ending)
        idle = wait_for(lambda: [pid for pid in actors("ray::TrialActor") if pid != busy], "a process without work")
        os.kill(idle[0], signal.SIGKILL)
        run.release(0)
        view = ending.result().view
    assert view.counts()["done"] == 3
    swept(undisturbed)
    assert told(run, "trial", "result", "clone") == told(undisturbed, "trial", "result", "clone")
    assert_whole(run, view)


def slow_to_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last result of a generation comes while those before it are still saved."""

    class SlowToPause(TrialActor):
        def save_checkpoint(self, checkpoint_dir: str) -> Any:
            time.sleep(0.5)
            return super().save_checkpoint(checkpoint_dir)

    monkeypatch.setattr(ray_tune, "TrialActor", SlowToPause)


def test_a_sweep_whose_node_dies_goes_on_on_another(tmp_path: Path, undisturbed_sweep: Undisturbed) -> None:
    run = sweep(tmp_path)
    run.hold(26)
    with ray_nodes() as nodes:
        nodes.add()
        launched = started(run, "--address", nodes.address)
        wait_for(lambda: len(list(run.gate.glob("held-*"))) == 2, "two trials at the gate")
        nodes.kill()
        run.release()
        nodes.add()
        launched.ended(0)
    assert told(run, "trial", "result") == told(undisturbed_sweep("none"), "trial", "result")
    uses = [line.split()[0] for line in (run.gate / "uses.txt").read_text().splitlines()]
    assert uses.count("0") == 4, "a trial has begun anew"
    assert_whole(run, view_of(ledger(run)))


def held(run: Run, ending: Future[Any]) -> int:
    """Pid of a process that waits at the gate."""
    found = wait_for(lambda: ending.done() or list(run.gate.glob("held-*")), "a trial at the gate")
    assert found is not True, ending.result()
    return int(found[0].name[5:])


def test_a_sigterm_to_all_processes_ends_a_sweep_with_its_states_saved_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed_sweep: Undisturbed
) -> None:
    run = sweep(tmp_path)
    (run.gate / "slow").write_text("0.03")
    launched = started(run)
    wait_for(lambda: count(run, "result"), "a first result")
    below, began = set(family(launched.pid)), time.monotonic()
    terminate_all(launched.pid)
    assert "the same command goes on" in launched.ended(75)
    assert time.monotonic() - began < 30
    assert not count(run, "failed")
    wait_for(lambda: not any(map(alive, below)), "the end of all its processes")
    (run.gate / "slow").unlink()
    uses = len((run.gate / "uses.txt").read_text().splitlines())
    assert swept(run).status == "finished"
    assert told(run, "trial", "result") == told(undisturbed_sweep("none"), "trial", "result")
    assert len((run.gate / "uses.txt").read_text().splitlines()) == 4 * EPOCHS * 11 > uses  # each step once
