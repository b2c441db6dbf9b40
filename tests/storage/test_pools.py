"""A pool of multiprocessing that a signal has broken is told from one that works on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for

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
