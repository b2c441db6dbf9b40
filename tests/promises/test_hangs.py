"""A worker that stops making progress, or makes less than the others, is found, named and, if it hangs, replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import torchrun, wait_for
from runs import Run, assert_same_bits

pytestmark = pytest.mark.ray

HANG_S = 8.0  # a step of these runs takes a millisecond, their first one a second, on busy cores some
# Stragglers are told after some seconds, not after half a minute. In so short a time it is chance what a rank gets of
# busy cores, tens of milliseconds a step: so the slow one is slow by many times that. A rank takes its time to end, so
# that torchrun's SIGTERM comes before it has.
SLOW_S = 0.2
QUICK = """
import time
import torch.distributed as dist
from raytrain import cli
from raytrain.keeper import heartbeat
heartbeat.WINDOW_STEPS, heartbeat.WINDOW_S = 8, 0.5
dist.destroy_process_group = lambda: time.sleep(2)
raise SystemExit(cli.main())
"""


def hanging(folder: Path, **changes: Any) -> Run:
    return Run(folder, {"TASK": "tasks_that_hang:Hanging", "SCALE.HANG_TIMEOUT": HANG_S, **changes})


def test_a_rank_that_hangs_is_named_and_the_run_ends_as_if_it_had_not(tmp_path: Path, undisturbed_on_two: Run) -> None:
    run = hanging(tmp_path, **{"SCALE.MAX_FAILURES": 1})
    (run.gate / "forward").write_text("9")
    said = run.run("--num_workers", "2")
    (hang,) = (r for r in run.records("event") if r["event"] == "hang")
    assert (hang["rank"], hang["step"], hang["phase"]) == (1, 10, "forward")
    assert hang["calls"][0].startswith("sleep_for_ever (") and hang["message"] in said
    assert "sleep_for_ever" in (run.run_dir / "logs" / "hang_rank_1.txt").read_text()
    assert_same_bits(run.payload()["model_state"], undisturbed_on_two.payload()["model_state"])


def test_a_call_that_holds_the_interpreter_for_ever_is_what_the_screen_shows(tmp_path: Path) -> None:
    run = hanging(tmp_path, **{"SCALE.MAX_FAILURES": 0})
    (run.gate / "eval").write_text("0")
    said = run.run("--num_workers", "2", status=1)
    assert "Training failed on rank 1 at step 6" in said and "in eval at step 6" in said
    assert "hold_the_interpreter (" in said and "without a word" not in said


def test_a_straggler_and_a_loader_worker_that_hangs_are_named_under_torchrun(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"OPTIMIZATION.NUM_EPOCHS": 1000, "CHECKPOINT.EVERY_STEPS": None, "EVAL": {"EVERY": None}}
    # Loader workers take their time to start.
    run = hanging(tmp_path, **{**changes, "LOADER.WORKERS": 1, "SCALE.HANG_TIMEOUT": 1.5 * HANG_S})
    (run.gate / "slow_forward").write_text(str(SLOW_S))
    launched = torchrun(["-c", QUICK, *run.words()], tmp_path, "--monitor_interval", "1")
    wait_for(lambda: "straggler: " in launched.output(), "the straggler")
    (run.gate / "data").write_text("3")
    said = launched.ended(1)
    assert said.count("straggler: ") == 1 and "straggler: rank 1 (process" in said and "most of that in forward" in said
    assert "in data at step" in said and "wait_for_a_lock_of_its_own (" in said
