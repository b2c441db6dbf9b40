"""A cluster that a run starts for itself: Ray Train without its helpers restarts, explains and cleans up too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TESTS, Run, family, gone

pytestmark = pytest.mark.ray


def test_a_worker_that_is_killed_is_one_screen(tmp_path: Path) -> None:
    run = Run(tmp_path, {"SCALE.MAX_FAILURES": 0})
    said = run.with_a_worker_killed_at(9, None, rank=1, status=1)
    assert said.count("failed on rank 1") == 1 and "died without a word" in said and "Traceback" not in said
    assert "(raylet)" not in said


def test_a_driver_that_is_killed_takes_its_cluster_with_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.hold(9)
    launched = run.start("--num_workers", "2", env={"RAY_ADDRESS": ""})
    run.held(2, launched)
    everyone = set(family(launched.pid))
    os.kill(launched.pid, signal.SIGKILL)
    launched.process.wait()
    gone(everyone)


def test_what_a_run_is_refused_for_is_said_and_its_cluster_ended(tmp_path: Path) -> None:
    launched = Run(tmp_path).start("--num_workers", "2", "--resume", "nowhere", env={"RAY_ADDRESS": ""})
    said = launched.ended(2)
    assert said.startswith("raytrain: ") and "nowhere" in said and said.count("\n") == 1
    assert not list(Path("/tmp").glob(f"raytrain-ray-{launched.pid}-*"))


def test_ray_keeps_its_own_way_where_its_version_is_not_known(tmp_path: Path) -> None:
    code = "from raytrain import own_cluster; own_cluster.TESTED = (); from raytrain.cli import main; exit(main())"
    words = [sys.executable, "-c", code, *Run(tmp_path).words("--num_workers", "2")]
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0 and "finished after epoch 3" in done.stdout, done.stdout + done.stderr
