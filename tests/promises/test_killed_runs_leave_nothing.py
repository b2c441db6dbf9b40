"""What processes that are killed (SIGKILL) leave in TMPDIR and /dev/shm is gone once the same command has ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server
from commands import Launched, family, gone, wait_for
from runs import Run, keepers_of, loader_workers_of

pytestmark = pytest.mark.ray

LOADING = {"LOADER.WORKERS": 1, "CHECKPOINT.SNAPSHOT_EVERY": 1}
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


def killed(run: Run, launched: Launched, victims: str, workers: list[int]) -> set[Path]:
    """Kills what `victims` says of the run, lets the others go on, and gives the semaphores that all of them had."""
    everyone = {pid for root in {launched.pid, *workers} for pid in family(root)}
    wait_for(lambda: semaphores_of(everyone), "the semaphores")
    semaphores = semaphores_of(everyone)
    chosen = {"driver": [launched.pid], "worker": workers[:1], "loader": loader_workers_of(workers[0])[:1]}
    for pid in chosen[victims]:
        os.kill(pid, signal.SIGKILL)
    if victims == "driver":
        launched.process.wait()
        gone(everyone)
    run.release()
    for path in run.gate.glob("held-*"):
        path.unlink()
    return semaphores


@pytest.mark.parametrize(
    ("flags", "victims"),
    [(HERE, "driver"), (HERE, "loader"), (ON_TWO, "driver"), (ON_TWO, "worker"), (ON_TWO, "loader")],
)
def test_the_same_command_clears_what_was_left(
    tmp_path: Path, temp_dir: Path, flags: tuple[str, ...], victims: str
) -> None:
    run, env = Run(tmp_path, LOADING), {"TMPDIR": str(temp_dir)}
    run.hold(8)
    launched = run.start(*flags, env=env)
    semaphores = killed(run, launched, victims, run.held(len(workers_of(flags)), launched))
    if victims != "driver":
        launched.process.wait()
    run.start(*flags, env=env).ended(0)
    assert_nothing_is_left(run, temp_dir, semaphores)


def workers_of(flags: Any) -> range:
    return range(max(1, int(flags[1])))


def test_the_copy_of_a_run_behind_a_uri_is_cleared_too(tmp_path: Path, temp_dir: Path) -> None:
    with s3_server.serving() as server:
        run, env = Run(tmp_path, LOADING), {"TMPDIR": str(temp_dir)}
        flags = [*HERE, "--output", server.uri("bucket/output")]
        run.hold(8)
        launched = run.start(*flags, env=env)
        semaphores = killed(run, launched, "driver", run.held(1, launched))
        run.start(*flags, env=env).ended(0)
        assert_nothing_is_left(run, temp_dir, semaphores)


def assert_nothing_is_left(run: Run, temp_dir: Path, semaphores: set[Path]) -> None:
    wait_for(lambda: not keepers_of(run), "the end of the keeper")
    assert semaphores
    assert sorted(path.name for path in temp_dir.iterdir()) == []
    assert [path for path in semaphores if path.exists()] == []
