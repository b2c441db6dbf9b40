"""A signal stops a run with its state saved, exit status 75; the same command goes on to the same bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Launched, family, gone, wait_for
from runs import Run, assert_curves_are_whole, assert_same_bits, loader_workers_of

from raytrain.cli import main
from raytrain.cluster.mailbox import Mailbox
from raytrain.training.signals import TWICE_S

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("name", "step"),
    [("SIGTERM", 14), ("SIGTERM", 21), ("SIGTERM", 32), ("SIGINT", 14)],  # mid-epoch, and the last of one and of all
)
def test_a_signal_stops_the_run_after_the_step_under_way(
    tmp_path: Path, undisturbed_here: Run, name: str, step: int
) -> None:
    run = Run(tmp_path)
    (run.gate / name).write_text(str(step))
    assert main(run.words("--num_workers", "0")) == 75
    assert_stopped_at(run, step + 1)
    (run.gate / name).unlink()
    assert main(run.words("--num_workers", "0")) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_its_processes_stops_the_run_after_the_step_under_way(
    tmp_path: Path, undisturbed_here: Run, number: signal.Signals
) -> None:
    """Ctrl-C is sent to the process group, and schedulers send SIGTERM so."""
    run = Run(tmp_path, {"LOADER.WORKERS": 2, "LOADER.PREFETCH": 1})
    run.hold(14)
    launched = run.start("--num_workers", "0")
    run.held(1, launched)
    everyone = set(family(launched.pid))
    os.killpg(launched.pid, number)
    run.release()
    assert "stopped" in launched.ended(75)
    gone(everyone)
    assert_stopped_at(run, 15)
    assert main(run.words("--num_workers", "0")) == 0
    assert_same_bits(run.payload(), undisturbed_here.payload())
    assert_curves_are_whole(run, steps_per_epoch=11)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_its_processes_while_loader_workers_start_stops_the_run_after_one_step(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 2, "SCALE.VIRTUAL_WORKERS": 2})
    launched = run.start("--num_workers", "0")
    wait_for(lambda: any(loader_workers_of(launched.pid)), "the first loader worker")
    everyone = set(family(launched.pid))
    os.killpg(launched.pid, number)
    launched.ended(75)
    gone(everyone)
    assert_stopped_at(run, 1)


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    run.hold(14)
    launched = run.start("--num_workers", "0")
    run.held(1, launched)
    everyone = set(family(launched.pid))
    os.kill(launched.pid, signal.SIGINT)
    time.sleep(TWICE_S + 0.5)
    assert launched.process.poll() is None  # it waits for the end of the step
    os.kill(launched.pid, signal.SIGINT)
    launched.ended(1)
    gone(everyone)
    assert run.names()[-1] == "checkpoint_step_12"


def test_a_signal_that_is_sent_twice_at_once_is_one(tmp_path: Path) -> None:
    """`timeout` sends it to its command, and then to the group that this is in."""
    run = Run(tmp_path)
    run.hold(14)
    launched = run.start("--num_workers", "0")
    run.held(1, launched)
    for _ in range(2):
        os.kill(launched.pid, signal.SIGTERM)
        time.sleep(0.1)
    run.release()
    launched.ended(75)
    assert_stopped_at(run, 15)


def test_a_sigterm_to_the_driver_stops_two_workers_at_one_step(
    tmp_path: Path, undisturbed_on_two: Run, ray_address: str
) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    stop_on_two_workers(run, ray_address, lambda launched, pids: os.kill(launched.pid, signal.SIGTERM))
    assert main(run.words("--num_workers", "2")) == 0
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_a_sigterm_to_a_worker_stops_the_whole_run(tmp_path: Path, undisturbed_on_two: Run, ray_address: str) -> None:
    run = Run(tmp_path)

    def send(launched: Launched, pids: list[int]) -> None:
        first = int((run.run_dir / ".lock").read_text().split()[1])
        os.kill(next(pid for pid in pids if pid != first), signal.SIGTERM)

    stop_on_two_workers(run, ray_address, send)
    assert main(run.words("--num_workers", "2")) == 0
    assert_same_bits(run.payload(), undisturbed_on_two.payload())


def test_ctrl_c_stops_a_run_on_a_cluster_of_its_own_with_its_state_saved(
    tmp_path: Path, undisturbed_on_two: Run, ray_address: str
) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    run.hold(9)
    launched = run.start("--num_workers", "2", env={"RAY_ADDRESS": ""})
    run.held(2, launched)
    everyone = set(family(launched.pid))
    os.killpg(launched.pid, signal.SIGINT)
    wait_for(lambda: "stopping" in launched.output(), "the driver's answer")
    run.release(slow_s=0.2)
    launched.ended(75)
    gone(everyone)
    stopped_at = run.lines("end")[-1]["step"]
    assert 10 <= stopped_at < 18
    assert_stopped_at(run, stopped_at)
    (run.gate / "slow").unlink()
    assert main(run.words("--num_workers", "2")) == 0
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_a_sigterm_while_ray_starts_stops_too_and_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path)
    launched = run.start("--num_workers", "2", env={"RAY_ADDRESS": ""})
    wait_for(lambda: len(set(family(launched.pid))) > 1, "the first process of Ray's")
    os.kill(launched.pid, signal.SIGTERM)
    everyone = set(family(launched.pid))
    assert "stopped: no worker trains at this moment, so there is nothing to save; the same" in launched.ended(75)
    gone(everyone)
    assert not list(Path("/tmp").glob(f"raytrain-ray-{launched.pid}-*"))


def stop_on_two_workers(run: Run, address: str, send: Callable[[Launched, list[int]], None]) -> None:
    """The run, stopped by `send` in its 10th step or soon after, as it ought to be."""
    run.hold(9)
    launched = run.start("--num_workers", "2", "--address", address)
    pids = run.held(2, launched)
    below = {pid for root in pids for pid in family(root)}
    send(launched, pids)
    launch = run.lines("run")[-1]["launch"]
    wait_for(lambda: Mailbox(launch).keys("stop"), "the wish to stop")
    run.release(slow_s=0.2)  # rank 0 asks five times a second
    launched.ended(75)
    gone(below)
    (run.gate / "slow").unlink()
    stopped_at = run.lines("end")[-1]["step"]
    assert 10 <= stopped_at < 18
    assert_stopped_at(run, stopped_at)


def assert_stopped_at(run: Run, step: int) -> None:
    """Journal and newest checkpoint say that step, and not one more was trained."""
    end = run.lines("end")[-1]
    assert (end["status"], end["step"]) == ("stopped", step)
    assert run.payload(run.names()[-1])["it"] == step
    assert run.lines("step")[-1]["step"] == step
