"""A run goes on when its workers or the nodes under them are taken away, and says what it waits for."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, SUPPORT, Launched, family, gone, wait_for
from ray_nodes import ray_nodes
from runs import Run, assert_curves_are_whole, assert_same_bits

from raytrain.cli import main
from raytrain.training.signals import TWICE_S

pytestmark = pytest.mark.ray


def started(run: Run, change: str, *flags: str, **changes: str) -> Launched:
    """The command on two workers, its driver changed so that a test need not wait."""
    code = f"from raytrain.cluster import driver; {change}; from raytrain.cli import main; exit(main())"
    words = [sys.executable, "-c", code, *run.words("--num_workers", "2", *flags)]
    env = {**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{ROOT}", "COLUMNS": "200", "RAY_ADDRESS": "", **changes}
    return Launched.of(words, run.folder, env)


def test_a_run_leaves_a_node_that_is_drained_and_waits_for_room_when_one_has_died(
    tmp_path: Path, undisturbed_on_two: Run
) -> None:
    run = Run(tmp_path)
    with ray_nodes() as nodes:
        first = nodes.add()
        run.hold(5)
        launched = started(run, "driver.WAIT_NOTICE_S = 1.0", "--address", nodes.address)
        run.held(2, launched)
        nodes.add()
        nodes.drain(first)
        wait_for(lambda: "preemption: node" in launched.output(), "word of the drained node")
        (run.gate / "slow").write_text("0.2")
        run.hold(12)
        wait_for(lambda: "restart: " in launched.output(), "the start on the other node")
        run.held(2, launched)
        nodes.kill()
        wait_for(lambda: "waiting: the cluster has no room yet" in launched.output(), "word of the wait for room")
        nodes.add()
        (run.gate / "slow").unlink()
        run.release()
        assert re.search(r"restart: ranks? .* died without a word in step .*go on after step 12\n", launched.ended(0))
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_a_restart_takes_processes_that_stand_ready_and_none_outlives_a_second_ctrl_c(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.hold(5)
    launched = started(run, "driver.SPARES_S = 0.1", TMPDIR=str(tmp_path))
    pids = run.held(2, launched)
    ready = wait_for(lambda: ready_below(launched.pid), "processes that stand ready")
    os.kill(pids[0], signal.SIGKILL)
    assert set(run.held(4, launched)) - set(pids) == ready
    everyone = set(family(launched.pid))
    os.killpg(launched.pid, signal.SIGINT)
    wait_for(lambda: "stopping" in launched.output(), "the driver's answer")
    time.sleep(TWICE_S + 0.2)
    os.killpg(launched.pid, signal.SIGINT)
    assert "stopped at once" in launched.ended(1)
    gone(everyone | set(family(launched.pid)))
    assert not (tmp_path / "ray").exists(), "a cluster that Ray has started by itself"


def test_a_run_that_is_complete_starts_no_cluster(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert main(run.words("--num_workers", "0")) == 0
    done = started(run, "import atexit, sys; atexit.register(lambda: print('ray' in sys.modules))").ended(0)
    assert "already complete" in done and done.endswith("False\n")


def ready_below(pid: int) -> set[int]:
    """Two worker processes of Ray's without work, that have imported what they need and rest; else none."""
    idle = {each for each in family(pid) if text_of(each, "cmdline").startswith("ray::IDLE")}
    if len(idle) < 2 or not all("libtorch" in text_of(each, "maps") for each in idle):
        return set()
    before = {each: ticks_of(each) for each in idle}
    time.sleep(1.0)
    return idle if before == {each: ticks_of(each) for each in idle} else set()


def ticks_of(pid: int) -> int:
    """The CPU time of a process; a thread that keeps in touch takes one now and then."""
    return sum(map(int, text_of(pid, "stat").rpartition(")")[2].split()[11:13])) // 5


def text_of(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:  # it has ended
        return ""
