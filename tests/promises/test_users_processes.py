"""A task's own pools, threads and programs work wherever its code is called, and none of their processes is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Launched, alive, terminate_all, torchrun, wait_for
from runs import Run
from small_runs import config, train
from tasks_with_processes import WAYS, kept_ones_ended

# Their processes are no forks of the test's, and import torch: whole runs try these.
SLOW = {"forkserver", "spawn", "loky"}
QUICK = sorted(set(WAYS) - SLOW)
TASK = "tasks_with_processes:Processes"
OPTIMIZATION = {"OPTIMIZER": "sgd", "LR": 0.01, "BATCH_SIZE_PER_GPU": 2, "NUM_EPOCHS": 1}
AREA = sum((i / 4) ** 4 for i in range(4))  # squared in samples, and in score


@pytest.mark.parametrize("way", QUICK)
@pytest.mark.timeout(60)
def test_in_one_process(tmp_path: Path, way: str) -> None:
    ways = {"IN_SAMPLES": [way], "IN_SCORE": [way]}
    cfg = config(tmp_path, "", OPTIMIZATION, TASK=TASK, DATA_CONFIG=ways)
    with kept_ones_ended():
        assert train(cfg).metrics == {"area": AREA}


def run_of(folder: Path, workers: int, epochs: int, **data_config: Any) -> Run:
    return Run(
        folder,
        {
            "TASK": TASK,
            "DATA_CONFIG": data_config,
            "OPTIMIZATION": {**OPTIMIZATION, "NUM_EPOCHS": epochs},
            "CHECKPOINT": {},
            "EVAL": {"EVERY": 1},
            "SCALE.THREADS": 2,
            "LOADER.WORKERS": workers,
        },
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("by", "workers", "slow"), [("one process", 2, ["forkserver", "loky"]), ("Ray", 1, ["spawn"]), ("torchrun", 1, [])]
)
def test_with_loader_workers(tmp_path: Path, by: str, workers: int, slow: list[str]) -> None:
    in_samples = ["fork", "joblib", "kept executor", "kept pool", "terminated", "torch"]
    ways = {"IN_BUILD": ["fork"], "IN_SAMPLES": in_samples, "IN_COLLATE": ["threads"], "IN_SCORE": [*QUICK, *slow]}
    run = run_of(tmp_path, workers, 1, **ways)
    if by == "torchrun":
        launched = torchrun(["-m", "raytrain", *run.words()], tmp_path)
    else:
        launched = run.start("--num_workers", "2" if by == "Ray" else "0", env={"RAY_ADDRESS": ""})
    launched.ended(0)
    assert [record["metrics"] for record in run.records("eval")] == [{"area": AREA}]
    assert_nothing_is_left(run)


def assert_nothing_is_left(run: Run) -> None:
    """All processes of a run, and what these start, have its folder as theirs."""

    def left() -> list[str]:
        return [str(process) for process in Path("/proc").glob("[0-9]*") if stands_in(run.folder, process)]

    wait_for(lambda: not left(), "the end of all processes", deadline_s=15)


def stands_in(folder: Path, process: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder and alive(int(process.name))
    except OSError:  # it has ended
        return False


def with_a_pool_at_work(folder: Path, num_workers: int = 0) -> tuple[Run, Launched, int]:
    """A run whose first evaluation waits for a process of a pool, and the pid of that."""
    run = run_of(folder, 0, 30, SLOW=str(folder))
    launched = run.start("--num_workers", str(num_workers), env={"RAY_ADDRESS": ""})
    [path] = wait_for(lambda: list(folder.glob("at-work-*")), "the pool's process")
    return run, launched, int(path.name.rpartition("-")[2])


def to_the_run(launched: Launched) -> None:
    os.kill(launched.pid, signal.SIGTERM)


def to_its_group(launched: Launched) -> None:
    """As `timeout` does."""
    os.kill(launched.pid, signal.SIGTERM)
    os.killpg(launched.pid, signal.SIGTERM)


def ctrl_c(launched: Launched) -> None:
    os.killpg(launched.pid, signal.SIGINT)


@pytest.mark.ray
@pytest.mark.parametrize("send", [to_the_run, to_its_group, ctrl_c])
def test_a_stop_waits_for_the_pool_that_an_evaluation_needs(tmp_path: Path, send: Callable[[Launched], None]) -> None:
    run, launched, worker = with_a_pool_at_work(tmp_path)
    send(launched)
    time.sleep(0.2)
    assert alive(worker)
    (tmp_path / "go").touch()
    launched.ended(75)
    assert [record["metrics"] for record in run.records("eval")] == [{"area": AREA}]
    assert_nothing_is_left(run)


def with_a_dead_pool(folder: Path, num_workers: int, loaders: int, place: str) -> tuple[Run, Launched]:
    """A run that waits for a pool whose process has just died, with what it was at."""
    run = run_of(folder, loaders, 1, **{place: [str(folder)]})
    launched = run.start("--num_workers", str(num_workers), env={"RAY_ADDRESS": ""})
    paths = wait_for(lambda: list(folder.glob("at-work-*")), "the pool's process")
    time.sleep(0.5)  # a driver has heard by then that the run has begun
    (folder / "go").touch()
    wait_for(lambda: not any(alive(int(path.name.rpartition("-")[2])) for path in paths), "its death")
    return run, launched


@pytest.mark.ray
@pytest.mark.parametrize(
    ("num_workers", "loaders", "place", "send"),
    [
        (0, 0, "IN_BUILD", to_the_run),
        (0, 1, "IN_COLLATE", ctrl_c),
        (2, 0, "IN_SCORE", to_its_group),
        (2, 1, "IN_SAMPLES", None),
    ],
)
def test_a_pool_that_dies_ends_its_run_with_the_cause(
    tmp_path: Path, num_workers: int, loaders: int, place: str, send: Callable[[Launched], None] | None
) -> None:
    run, launched = with_a_dead_pool(tmp_path, num_workers, loaders, place)
    began = time.monotonic()
    if send is not None:
        send(launched)
    said = launched.ended(1)
    assert time.monotonic() - began < 30
    assert "multiprocessing.Pool (1 by fork) died" in said and "by SIGSEGV" in said
    assert "in by_dying" in said
    assert_nothing_is_left(run)


def ctrl_c_twice(launched: Launched) -> None:
    ctrl_c(launched)
    time.sleep(0.5)
    ctrl_c(launched)


def kill(launched: Launched) -> None:
    os.kill(launched.pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.parametrize(("num_workers", "status"), [(0, -signal.SIGTERM), (2, 75)])
def test_a_sigterm_to_all_processes_does_not_have_a_run_wait_for_a_pool_that_it_broke(
    tmp_path: Path, num_workers: int, status: int
) -> None:
    run, launched, worker = with_a_pool_at_work(tmp_path, num_workers)
    terminate_all(launched.pid)
    wait_for(lambda: not alive(worker), "the end of the pool's process")
    (tmp_path / "go").touch()  # for an evaluation that is made again
    launched.ended(status)
    assert_nothing_is_left(run)


@pytest.mark.ray
@pytest.mark.parametrize("send", [ctrl_c_twice, kill])
def test_a_pool_at_work_ends_with_its_run(tmp_path: Path, send: Callable[[Launched], None]) -> None:
    run, launched, worker = with_a_pool_at_work(tmp_path)
    send(launched)
    launched.process.wait(20)
    wait_for(lambda: not alive(worker), "the end of the pool's process", deadline_s=10)
    assert_nothing_is_left(run)
