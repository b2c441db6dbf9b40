"""Who is killed when processes stand still, by real ones that beat and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain.keeper.heartbeat import DATA, FORWARD, NUMBER, PHASE, REDUCE, STEP
from raytrain.keeper.shared_memory import StatusTable
from raytrain.keeper.watchdog import LOOK_S, Watchdog
from raytrain.storage.processes import started_at

TIMEOUT_S = 1.0


@contextlib.contextmanager
def watched(folder: Path, phases: list[str], steps: list[int]) -> Iterator[tuple[Watchdog, list[Any]]]:
    """A watchdog, and a process for each phase that does nothing at this step of it."""
    status = StatusTable.made()
    watchdog = Watchdog(status, str(folder))
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in phases]
    for rank, (process, phase, step) in enumerate(zip(processes, phases, steps, strict=True)):
        worker = {"rank": rank, "pid": process.pid, "started": started_at(process.pid), "thread": 0}
        place = watchdog.add(object(), os.memfd_create("stacks"), **worker, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        status.heartbeat(place)[STEP], status.heartbeat(place)[PHASE] = step, NUMBER[phase]
    try:
        yield watchdog, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ended(processes: list[Any]) -> list[int]:
    """Ranks of those that end first, and within half the timeout after."""
    until = time.monotonic() + 20
    while not any(process.poll() is not None for process in processes) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(TIMEOUT_S / 2)
    return [rank for rank, process in enumerate(processes) if process.poll() is not None]


def test_who_waits_for_the_others_is_not_the_one_that_hangs(tmp_path: Path) -> None:
    with watched(tmp_path, [REDUCE, DATA, FORWARD], [5, 5, 6]) as (watchdog, processes):
        assert ended(processes) == [1]
        assert [hang.report["rank"] for hang in watchdog.hangs] == [1]


def test_one_that_the_others_are_ahead_of_waits_for_nobody(tmp_path: Path) -> None:
    with watched(tmp_path, [REDUCE, REDUCE], [6, 5]) as (_, processes):
        assert ended(processes) == [1]


def test_the_time_that_a_whole_run_is_stopped_does_not_count(tmp_path: Path) -> None:
    with watched(tmp_path, [FORWARD, FORWARD], [5, 5]) as (watchdog, processes):
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        still_s = []
        for _ in range(20):
            still_s += [each.still_s for each in watchdog._watched.values()]
            time.sleep(LOOK_S / 5)
        assert max(still_s) <= TIMEOUT_S  # else they could be killed as soon as they go on


def test_a_process_that_is_stopped_is_killed_unless_all_are(tmp_path: Path) -> None:
    with watched(tmp_path, [REDUCE, REDUCE], [5, 5]) as (watchdog, processes):
        for process in processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT_S + 1)
        assert not watchdog.hangs
        os.kill(processes[1].pid, signal.SIGCONT)
        assert ended(processes) == [0]
        assert "was stopped (SIGSTOP)" in watchdog.hangs[0].report["message"]
