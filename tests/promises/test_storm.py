"""The storm: a run whose workers are killed again and again, and once its driver, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import gone
from runs import Run, assert_same_bits, assert_uses_once, steps_repeated, wait_for_steps

from raytrain.cli import main
from raytrain.keeper import client

pytestmark = pytest.mark.ray

EPOCHS, SAMPLES = 4, 400  # 200 steps of 8 samples
EVERY_STEPS = 25
KILLS = 5  # of a worker, but for one of the driver
STORM: dict[str, Any] = {
    "TASK": "tasks_for_faults:Named",
    "DATA_CONFIG.NUM_SAMPLES": SAMPLES,
    "OPTIMIZATION.NUM_EPOCHS": EPOCHS,
    "CHECKPOINT.EVERY_STEPS": EVERY_STEPS,
    "CHECKPOINT.SNAPSHOT_EVERY": "auto",
    "SCALE.VIRTUAL_WORKERS": 2,
    "SCALE.MAX_FAILURES": -1,
}


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    alone, run = Run(tmp_path / "alone", STORM), Run(tmp_path / "storm", STORM)
    assert main(alone.words("--num_workers", "0")) == 0
    seed = os.environ.get("STORM_SEED") or str(random.SystemRandom().randrange(1000))
    print(f"once more the same: STORM_SEED={seed}")
    chance = random.Random(seed)
    (run.gate / "slow").write_text("0.02")
    launched, drivers_turn = run.start("--num_workers", "2"), chance.randrange(1, KILLS - 1)
    for kill in range(KILLS):
        wait_for_steps(run, chance.randrange(15, 30), launched, lambda: len(pids_of(run)) == 2)
        pids = pids_of(run)
        if kill == drivers_turn:
            launched.kill(pids, workers_too=False)
            launched = run.start("--num_workers", "2")
        else:
            os.kill(chance.choice(pids), signal.SIGKILL)
            gone(set(pids))
    launched.ended(0)
    epoch = f"checkpoint_epoch_{EPOCHS}"
    assert_same_bits(run.payload(epoch), alone.payload(epoch))
    assert_uses_once(alone, 2, EPOCHS, SAMPLES)
    assert_uses_once(run, 2, EPOCHS, SAMPLES)
    assert evaluations(run) == evaluations(alone)
    print(f"steps repeated: {steps_repeated(run, 2)}, after {KILLS} kills")
    assert steps_repeated(run, 2) < KILLS * EVERY_STEPS
    assert all(path.name.startswith("checkpoint_") for path in run.ckpt.iterdir())
    assert client.connect(str(run.run_dir)) is None


def pids_of(run: Run) -> list[int]:
    """The workers, by rank."""
    return [int(path.read_text()) for path in sorted(run.gate.glob("rank-*"))]


def evaluations(run: Run) -> list[tuple[int, dict[str, float]]]:
    return [(record["step"], record["metrics"]) for record in run.records("eval")]
