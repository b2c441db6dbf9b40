"""A pool of multiprocessing whose workers have died is told from one that works on, and does not stand still."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for

from raytrain.errors import LINE_LENGTH
from raytrain.storage import pools

FORK = multiprocessing.get_context("fork")


def wait_in(folder: str) -> None:
    Path(folder, f"at-work-{os.getpid()}").touch()
    while not Path(folder, "go").exists():
        time.sleep(0.01)


def by_map(pool: Any, folder: Path) -> Any:
    return pool.map(wait_in, [str(folder)])


def by_imap(pool: Any, folder: Path) -> Any:
    return list(pool.imap_unordered(wait_in, [str(folder)]))


def test_nothing_is_looked_at_where_nobody_waits_for_a_pool() -> None:
    threads = threading.active_count()
    pools.when_pools_are_broken(lambda: None)
    assert threading.active_count() == threads


@pytest.mark.parametrize("wait", [by_map, by_imap])
@pytest.mark.parametrize("killed", [False, True])  # such waits are left, and would be found again
def test_a_wait_for_a_worker_that_was_killed_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Any, killed: bool
) -> None:
    monkeypatch.setattr(pools, "LOOK_S", 0.3)
    ends: list[bool] = []
    with FORK.Pool(1) as pool:
        thread = threading.Thread(target=wait, args=(pool, tmp_path), daemon=True)
        thread.start()
        [at_work] = wait_for(lambda: list(tmp_path.glob("at-work-*")), "the pool's process")
        pools.when_pools_are_broken(lambda: ends.append(True))
        if killed:
            os.kill(int(at_work.name.rpartition("-")[2]), signal.SIGTERM)
        time.sleep(0.5)
        assert ends == [True] * killed
        (tmp_path / "go").touch()
        if not killed:
            thread.join()


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in processes of a run, and soon."""
    pools.break_pools()
    monkeypatch.setattr(pools, "GRACE_S", 0.2)


def ends_by(number: int) -> None:
    os.kill(os.getpid(), number)


def begins_badly(code: int) -> None:
    raise SystemExit(code)


def ends_at_four(value: int) -> int:
    if value == 4:
        os._exit(7)
    return value


def killed_while_idle(pool: Any) -> Any:
    for worker in list(pool._pool):
        os.kill(worker.pid, signal.SIGKILL)  # one holds the lock that all get their tasks by
    time.sleep(0.1)
    return pool.map(abs, range(4))


DEATHS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "leaves": (lambda pool: pool.map(os._exit, [0, 0, 0]), "with exit code 0"),
    "sys.exit": (lambda pool: pool.apply(sys.exit, [3]), "with exit code 3"),
    "crash": (lambda pool: pool.starmap(ends_by, [[signal.SIGSYS]]), "(?s)by SIGSYS.*get_context"),
    "terminated": (lambda pool: pool.apply_async(ends_by, [signal.SIGTERM]).get(), "by SIGTERM"),
    "memory": (lambda pool: pool.apply_async(ends_by, [signal.SIGKILL]).get(60), "(?s)by SIGKILL.* ran out of memory"),
    "imap": (lambda pool: list(pool.imap(ends_at_four, range(9))), "with exit code 7"),
    "in chunks": (lambda pool: list(pool.imap_unordered(ends_at_four, range(9), 2)), "with exit code 7"),
    "idle": (killed_while_idle, "by SIGKILL"),
}


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.timeout(30)
def test_a_pool_whose_workers_die_raises_what_became_of_them(breaking: None, death: str) -> None:
    use, said = DEATHS[death]
    with FORK.Pool(2) as pool, pytest.raises(multiprocessing.ProcessError, match=said) as raised:
        use(pool)
    assert max(map(len, str(raised.value).splitlines())) < LINE_LENGTH  # the failure screen shows all of it
    assert pool._pool and not any(worker.is_alive() for worker in pool._pool)


@pytest.mark.timeout(30)
def test_a_pool_whose_workers_die_as_they_begin_gives_up(breaking: None) -> None:
    with (
        FORK.Pool(8, begins_badly, [5]) as pool,  # more at once than are named, on however busy a machine
        pytest.raises(multiprocessing.ProcessError, match=r"with exit code 5, and \d+ more"),
    ):
        pool.map(abs, range(4))


@pytest.mark.timeout(30)
def test_a_pool_that_is_only_joined_says_what_it_lost(breaking: None, capfd: pytest.CaptureFixture[str]) -> None:
    pool = FORK.Pool(1)
    pool.apply_async(os._exit, [7])
    pool.close()
    pool.join()
    assert "raytrain: workers of a multiprocessing.Pool (1 by fork) died" in capfd.readouterr().err


@pytest.mark.timeout(30)
def test_workers_that_end_after_so_many_tasks_break_nothing(breaking: None) -> None:
    with FORK.Pool(2, maxtasksperchild=1) as pool:
        assert pool.map(abs, range(20), chunksize=1) == list(range(20))
        assert pool.apply_async(time.sleep, [0.5]).get() is None


def sum_in_numba(count: int) -> float:
    numba = pytest.importorskip("numba", reason="no numba, whose parallel loops this tries")

    @numba.njit(parallel=True)
    def total(count: int) -> float:
        found = 0.0
        for i in numba.prange(count):
            found += i
        return found

    return float(total(count))


@pytest.mark.timeout(60)
def test_numbas_loops_in_a_fork_are_refused_with_what_to_write(breaking: None) -> None:
    sum_in_numba(8)
    if pools.numba_layer() != "omp":
        pytest.skip("numba has no GNU OpenMP here")
    with FORK.Pool(1) as pool, pytest.raises(multiprocessing.ProcessError, match="NUMBA_THREADING_LAYER=forksafe"):
        pool.map(sum_in_numba, [8])
