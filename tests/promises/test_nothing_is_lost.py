"""What memory keeps: a killed run has lost the step under way and nothing else, and nothing of its own is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, wait_for
from runs import EPOCHS, Run, assert_same_bits, assert_uses_once, keeper_of

from raytrain.keeper import client

pytestmark = pytest.mark.ray

MEMORY = {"CHECKPOINT.SNAPSHOT_EVERY": 1, "CHECKPOINT.EVERY_STEPS": None}


def keeper_is_gone(run: Run) -> bool:
    line = client.connect(str(run.run_dir))
    if line is not None:
        line.close()
    return line is None


def passes_of(run: Run) -> dict[int, int]:
    """How often the pass of each step was begun."""
    lines = (run.gate / "uses.txt").read_text().splitlines()
    steps = [int(line.split()[0]) for line in lines]
    return {step: steps.count(step) for step in steps}


def test_a_run_killed_in_mid_epoch_goes_on_from_the_very_step(tmp_path: Path, undisturbed_here: Run) -> None:
    run = Run(tmp_path, MEMORY)
    run.killed_at(15, "--num_workers", "0")
    wait_for(lambda: keeper_is_gone(run), "the end of the keeper")
    assert run.names()[-1] == "checkpoint_step_15"  # nobody had asked for it
    said = run.run("--num_workers", "0")
    assert "checkpoint_step_15: epoch 2, after step 15" in said
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_uses_once(run, 1)
    assert {step: n for step, n in passes_of(run).items() if n > 1} == {15: 2}
    assert keeper_is_gone(run)


def test_a_run_killed_where_the_clock_is_behind_that_of_an_earlier_launch_has_lost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, MEMORY)
    for zone, step in (("UTC-9", 5), ("UTC", 15)):
        monkeypatch.setenv("TZ", zone)
        run.killed_at(step, "--num_workers", "0")
        assert run.names()[-1] == f"checkpoint_step_{step}"


def test_a_run_started_again_at_once_waits_for_what_its_keeper_still_writes(
    tmp_path: Path, undisturbed_here: Run
) -> None:
    run = Run(tmp_path, MEMORY)
    run.hold(15)
    launched = run.start("--num_workers", "0")
    launched.kill(run.held(1, launched))
    run.release()
    assert "after step 15" in run.run("--num_workers", "0")
    assert_same_bits(run.payload(), undisturbed_here.payload())


def test_a_run_whose_keeper_is_killed_goes_on_with_another(tmp_path: Path, undisturbed_here: Run) -> None:
    run = Run(tmp_path, {**MEMORY, "CHECKPOINT.EVERY_STEPS": 2})
    run.hold(8)
    launched = run.start("--num_workers", "0")
    run.held(1, launched)
    os.kill(keeper_of(run), signal.SIGKILL)
    wait_for(lambda: keeper_is_gone(run), "the end of the keeper")
    (run.gate / "hold").write_text("15")  # seven steps on
    for path in run.gate.glob("held-*"):
        path.unlink(missing_ok=True)  # by the process itself, which goes on
    run.held(1, launched)
    launched.kill([])
    run.release()
    wait_for(lambda: keeper_is_gone(run), "the end of the second keeper")
    assert run.names()[-1] == "checkpoint_step_15"
    run.run("--num_workers", "0")
    assert_same_bits(run.payload(), undisturbed_here.payload())


def test_a_failure_in_the_tasks_own_code_leaves_the_state_before_it(tmp_path: Path, undisturbed_here: Run) -> None:
    run = Run(tmp_path, MEMORY)
    (run.gate / "fail").write_text("15")
    run.run("--num_workers", "0", status=1)
    assert keeper_is_gone(run)
    assert run.names()[-1] == "checkpoint_step_15"
    (run.gate / "fail").unlink()
    run.run("--num_workers", "0")
    assert_same_bits(run.payload(), undisturbed_here.payload())


def test_a_second_launch_does_not_take_the_state_of_one_that_trains(tmp_path: Path) -> None:
    run = Run(tmp_path, MEMORY)
    run.hold(3)
    launched = run.start("--num_workers", "0")
    run.held(1, launched)
    wait_for(lambda: client.newest_progress(str(run.run_dir)) is not None, "a state in memory")
    check = [sys.executable, "-m", "raytrain", "checkpoints", str(run.run_dir)]
    told = subprocess.run(check, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"})
    assert "in memory on this host: the state after step 3" in told.stdout
    began = time.monotonic()
    client.take_over(str(run.run_dir), timeout_s=0.5)
    assert time.monotonic() - began > 0.4
    assert not keeper_is_gone(run)
    run.release()
    launched.ended(0)
    assert run.names()[-1] == f"checkpoint_epoch_{EPOCHS}"


def test_a_run_folder_removed_under_a_dead_run_does_not_come_back(tmp_path: Path) -> None:
    run = Run(tmp_path, MEMORY)
    run.hold(3)
    launched = run.start("--num_workers", "0")
    pids = run.held(1, launched)
    keeper = keeper_of(run)
    os.kill(keeper, signal.SIGSTOP)
    launched.kill(pids)
    subprocess.run(["rm", "-r", str(run.folder / "output")], check=True)
    os.kill(keeper, signal.SIGCONT)
    wait_for(lambda: keeper_is_gone(run), "the end of the keeper")
    assert not (run.folder / "output").exists()


def test_a_second_run_of_the_same_user_in_another_folder_has_a_keeper_of_its_own(tmp_path: Path) -> None:
    assert client.address_of(str(tmp_path / "a")) != client.address_of(str(tmp_path / "b"))


def test_the_keeper_starts_without_torch() -> None:
    code = "import sys, raytrain.keeper.keeper; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
