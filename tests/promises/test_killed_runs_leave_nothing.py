"""What processes that are killed (SIGKILL) leave in TMPDIR and /dev/shm is gone once the same command has ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
from commands import Launched, alive, family, gone, wait_for
from runs import Run, keepers_of, loader_workers_of

pytestmark = pytest.mark.ray

LOADING = {"LOADER.WORKERS": 1, "LOADER.PREFETCH": 1, "CHECKPOINT.SNAPSHOT_EVERY": 1}
HERE, ON_TWO = ("--num_workers", "0"), ("--num_workers", "2")


@pytest.fixture
def temp_dir() -> Iterator[Path]:
    """For TMPDIR: so short that all which needs a short path lies in it."""
    folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def semaphores_of(pids: set[int]) -> set[Path]:
    """Those with a name that these processes have open."""
    return {Path(name) for pid in pids for name in re.findall(r"/dev/shm/sem\.\S+", maps_of(pid))}


def maps_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has ended
        return ""


def killed(run: Run, launched: Launched, workers: list[int], victim: int, next_hold: int = 1000) -> set[Path]:
    """Kills that process of the run; the others go on to the next hold. The semaphores that all of them had."""
    everyone = {pid for root in {launched.pid, *workers} for pid in family(root)}
    wait_for(lambda: semaphores_of(everyone), "the semaphores")
    semaphores = semaphores_of(everyone)
    os.kill(victim, signal.SIGKILL)
    if victim == launched.pid:
        launched.process.wait()
        gone(everyone)
    run.hold(next_hold)
    for pid in workers:
        held = run.gate / f"held-{pid}"
        wait_for(lambda pid=pid, held=held: not (held.exists() and alive(pid)), "a worker that goes on, or has died")
        held.unlink(missing_ok=True)
    return semaphores


def test_the_same_command_clears_what_a_run_in_one_process_left(tmp_path: Path, temp_dir: Path) -> None:
    run, env = Run(tmp_path, LOADING), {"TMPDIR": str(temp_dir)}
    run.hold(8)
    launched = run.start(*HERE, env=env)
    [worker] = run.held(1, launched)
    semaphores = killed(run, launched, [worker], loader_workers_of(worker)[0], next_hold=20)
    assert "loader worker" in launched.ended(1)
    launched = run.start(*HERE, env=env)
    semaphores |= killed(run, launched, run.held(1, launched), launched.pid)
    run.start(*HERE, env=env).ended(0)
    assert_nothing_is_left(run, temp_dir, semaphores)


def test_the_same_command_clears_what_a_run_on_two_workers_left(tmp_path: Path, temp_dir: Path) -> None:
    """One launch in which a loader worker, a worker and then the command itself are killed, and another."""
    run, env = Run(tmp_path, LOADING), {"TMPDIR": str(temp_dir)}
    run.hold(4)
    launched = run.start(*ON_TWO, env=env)
    workers = run.held(2, launched)
    semaphores = killed(run, launched, workers, loader_workers_of(workers[0])[0], next_hold=10)
    workers = run.held(2, launched)
    semaphores |= killed(run, launched, workers, workers[0], next_hold=16)
    semaphores |= killed(run, launched, run.held(2, launched), launched.pid)
    run.start(*ON_TWO, env=env).ended(0)
    failed, died = (event["message"] for event in run.records("event") if event["event"] == "restart")
    assert re.match(r"rank \d failed in step .*LostLoaderError.*; the workers were started again and go on", failed)
    assert re.match(r"ranks? .* died without a word in step .*; the workers were started again and go on", died)
    assert_nothing_is_left(run, temp_dir, semaphores)


def test_the_copy_of_a_run_behind_a_uri_is_cleared_too(tmp_path: Path, temp_dir: Path) -> None:
    with s3_server.serving() as server:
        run, env = Run(tmp_path, LOADING), {"TMPDIR": str(temp_dir)}
        flags = [*HERE, "--output", server.uri("bucket/output")]
        run.hold(8)
        launched = run.start(*flags, env=env)
        semaphores = killed(run, launched, run.held(1, launched), launched.pid)
        run.start(*flags, env=env).ended(0)
        assert_nothing_is_left(run, temp_dir, semaphores)


def assert_nothing_is_left(run: Run, temp_dir: Path, semaphores: set[Path]) -> None:
    wait_for(lambda: not keepers_of(run), "the end of the keeper")
    assert semaphores
    assert sorted(path.name for path in temp_dir.iterdir()) == []
    assert [path for path in semaphores if path.exists()] == []
