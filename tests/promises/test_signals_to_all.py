"""What schedulers, service managers and terminals send to all processes of a run at once is the driver's to answer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import alive, children_of, environment, family, gone, terminate_all, wait_for
from runs import Run, assert_curves_are_whole, assert_same_bits

from raytrain.cli import main

pytestmark = pytest.mark.ray


def test_a_sigterm_to_all_processes_stops_a_run_with_its_state_saved(tmp_path: Path, undisturbed_on_two: Run) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 2})
    run.hold(9)
    launched = run.start("--num_workers", "2", env={"RAY_ADDRESS": ""})
    run.held(2, launched)
    everyone, began = set(family(launched.pid)), time.monotonic()
    terminate_all(launched.pid)
    wait_for(lambda: "stopping" in launched.output(), "the driver's answer")
    run.release(slow_s=0.2)
    launched.ended(75)
    assert time.monotonic() - began < 30  # systemd kills after 90 s, Slurm after 30
    wait_for(lambda: not any(map(alive, everyone)), "the end of Ray's agents too", deadline_s=10)
    assert not list(Path("/tmp").glob(f"raytrain-ray-{launched.pid}-*"))
    end = run.lines("end")[-1]
    assert end["status"] == "stopped" and 10 <= end["step"] < 18
    assert run.payload(run.names()[-1])["it"] == end["step"]
    (run.gate / "slow").unlink()
    assert main(run.words("--num_workers", "2")) == 0
    assert_same_bits(run.payload(), undisturbed_on_two.payload())
    assert_curves_are_whole(run, steps_per_epoch=6)


def test_ctrl_z_stops_all_of_a_run_and_fg_has_it_go_on_as_if_nothing_had_been(
    tmp_path: Path, undisturbed_on_two: Run
) -> None:
    run = Run(tmp_path, {"LOADER.WORKERS": 1})
    run.hold(9)
    with terminal(tmp_path) as (shell, typed, output):
        typed(f"{sys.executable} -m raytrain {' '.join(run.words('--num_workers', '2'))}\n")
        wait_for(lambda: len(list(run.gate.glob("held-*"))) == 2, "the step at which the test holds the run")
        [driver] = children_of(shell)
        everyone = set(family(driver))
        typed("\x1a")
        wait_for(lambda: all(map(is_stopped, everyone)), "the stop of all processes")
        run.release()
        time.sleep(1)
        assert all(map(is_stopped, everyone))
        typed("fg; echo ended with $?\n")
        wait_for(lambda: "ended with 0" in output(), "the end of the run")
        gone(everyone)
    assert "started again" not in output()
    assert [record["event"] for record in run.records("event")] == []
    assert_same_bits(run.payload(), undisturbed_on_two.payload())


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def terminal(folder: Path) -> Iterator[tuple[int, Callable[[str], None], Callable[[], str]]]:
    """A shell in a terminal of its own: its pid, what types there, and what is to be seen."""
    ours, its = os.openpty()
    code = (
        "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execvp('bash', ['bash', '--norc', '--noprofile', '-i'])"
    )
    env = {**environment(), "RAY_ADDRESS": "", "HISTFILE": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=env, stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    seen: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the shell has ended
            while text := os.read(ours, 4096):
                seen.append(text)

    def typed(text: str) -> None:
        os.write(ours, text.encode())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process.pid, typed, lambda: b"".join(seen).decode(errors="replace")
    finally:
        for pid in [*family(process.pid)][::-1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        reader.join()
        os.close(ours)
