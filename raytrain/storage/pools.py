"""Pools of module multiprocessing that a signal to all processes of a run (systemd, Slurm) has broken.

A worker that is ended is replaced, but what it was at is lost, and who waits for that waits for ever.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

LOOK_S = 1.0  # after so long the pool has noticed


def when_pools_are_broken(end: Callable[[], None]) -> None:
    """For a handler of a signal: calls `end` soon if that has ended workers of a pool too that a thread waits for."""
    waits = waits_for_pools()
    workers = [worker for pool in waits.values() for worker in pool._pool]
    if not workers:
        return

    def look() -> None:
        time.sleep(LOOK_S)
        if waits.keys() & waits_for_pools().keys() and any(worker.exitcode for worker in workers):
            end()

    threading.Thread(target=look, name="raytrain-pools", daemon=True).start()


def waits_for_pools() -> dict[FrameType, Any]:
    """The calls that wait for results of a pool, in all threads, and for which."""
    module = sys.modules.get("multiprocessing.pool")
    if module is None:  # nobody has a pool
        return {}
    calls = {module.ApplyResult.wait.__code__, module.IMapIterator.next.__code__}
    found: dict[FrameType, Any] = {}
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code in calls and (pool := frame.f_locals["self"]._pool) is not None:
                found[frame] = pool
            frame = frame.f_back
    return found
