"""Pools of module multiprocessing whose workers have died.

A worker that has died is replaced, but what it was at is lost, and who waits for that waits for ever. Such a pool is
broken here, as concurrent.futures breaks its own. Where a signal to all processes of a run (systemd, Slurm) was the
cause, the run has ended before.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

LOOK_S = 1.0  # after so long the pool has noticed
GRACE_S = 2.0  # longer than LOOK_S; so long results may still come after a worker's death
LOCK_S = 0.5  # longer than a thread of the pool's holds a lock
END_S = 1.0  # so long a broken pool may take to end before that is told
BY_SIGNAL = (-signal.SIGTERM, -signal.SIGINT)  # exit codes of those that have died of it before this process knows
SHOWN = 3  # workers in a message


@functools.cache
def break_pools() -> None:
    """From now on pools of this process, and of those that it forks, break where they would stand still."""
    from multiprocessing.pool import Pool

    pool_class: Any = Pool
    handle = pool_class._handle_workers.__func__

    def handle_workers(
        cls: Any, cache: Any, taskqueue: Any, ctx: Any, process: Any, processes: int, workers: Any, *rest: Any
    ) -> None:
        if isinstance(workers[0], multiprocessing.process.BaseProcess):  # a ThreadPool's cannot be killed
            may_leave = rest[4] is not None  # maxtasksperchild
            process = PoolWorkers(cache, workers, process, may_leave).another
        handle(cls, cache, taskqueue, ctx, process, processes, workers, *rest)

    pool_class._handle_workers = classmethod(handle_workers)


class PoolWorkers:
    """All workers of a pool, in the thread of its own that replaces those that have ended."""

    def __init__(
        self, cache: dict[int, Any], workers: Iterable[Any], start: Callable[..., Any], may_leave: bool
    ) -> None:
        """cache: the pool's results that are not there yet.   start: makes a worker

        may_leave: whether workers end by themselves after so many tasks
        """
        self._cache, self._workers, self._start, self._may_leave = cache, list(workers), start, may_leave
        self._handler: Any = threading.current_thread()
        self._died: list[Any] = []

    def another(self, *args: Any, **options: Any) -> Any:
        """A worker in place of one that has ended."""
        ended = [worker for worker in self._workers if worker.exitcode is not None]
        died = [worker for worker in ended if worker.exitcode or not self._may_leave]
        if died and not self._died:
            threading.Thread(target=self._watch, name="raytrain-broken-pool", daemon=True).start()
        self._died += died
        self._workers = [worker for worker in self._workers if worker not in ended]
        self._workers.append(self._start(*args, **options))
        return self._workers[-1]

    def _watch(self) -> None:
        """A worker has died: with what it was at, or with the lock that the others get their tasks by."""
        while self._handler.is_alive():
            awaited = dict(self._cache)
            time.sleep(GRACE_S)
            pools = [result._pool for job, result in awaited.items() if job in self._cache]
            if pools and pools[0] is not None and pools[0]._state != "TERMINATE":
                self._break(pools[0])

    def _break(self, pool: Any) -> None:
        """What is waited for of the pool fails, once all its processes have been killed."""
        error = multiprocessing.ProcessError(self._message(pool))
        if pool not in waits_for_pools().values():  # perhaps nobody asks for results, but only joins the pool
            print(f"raytrain: {error}", file=sys.stderr, flush=True)
        self._handler._state = "TERMINATE"  # or it would start others
        pool._change_notifier.put(None)
        self._handler.join()
        for worker in pool._pool:
            worker.kill()
        for worker in pool._pool:
            worker.join(END_S)
        for lock in (pool._inqueue._rlock, pool._outqueue._wlock):
            lock.acquire(timeout=LOCK_S)  # in vain: one that was killed has held it
            lock.release()
        ending = threading.Thread(target=pool.terminate, daemon=True)
        ending.start()
        ending.join(END_S)  # it may be in the midst of what one was writing
        for result in list(self._cache.values()):
            fail(result, error)

    def _message(self, pool: Any) -> str:
        method = pool._ctx.get_start_method()
        died = [f"{each.name} (process {each.pid}) {end_of(each.exitcode)}" for each in self._died[:SHOWN]]
        more = f", and {len(self._died) - SHOWN} more" if len(self._died) > SHOWN else ""
        lines = [  # each on one of the failure screen, which cuts them
            f"workers of a multiprocessing.Pool ({pool._processes} by {method}) died while results of it were awaited:",
            f"{', '.join(died)}{more}.",
            "What these were at is lost; the pool would start others and wait for it for ever.",
            *advice(method, {each.exitcode for each in self._died}),
        ]
        return "\n".join(lines)


def end_of(exitcode: int) -> str:
    """How a process has ended, in words."""
    if exitcode >= 0:
        return f"with exit code {exitcode}"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        return f"by {signal.Signals(-exitcode).name}"
    return f"by signal {-exitcode}"


def advice(method: str, exitcodes: set[int]) -> list[str]:
    """What to do about workers that were started by this method and ended so."""
    spawn = "multiprocessing.get_context('spawn').Pool"
    if method == "fork" and numba_layer() == "omp":
        return [
            "numba's parallel loops have run here by GNU OpenMP, which ends any fork that runs one. Start the pool by",
            f"{spawn}, or set NUMBA_THREADING_LAYER=forksafe: that is tbb if it is",
            "installed, else workqueue, whose loops no two threads may run at once",
        ]
    if -signal.SIGKILL in exitcodes:
        return ["Most often the machine ran out of memory: give the pool fewer processes"]
    said = ["What they said stands in the output of this process, and in the logs"]
    if method == "fork" and min(exitcodes) < 0:
        said.append(f"Native code and locks may fail after a fork; {spawn} does without")
    return said


def numba_layer() -> str:
    """How numba has run parallel loops in this process; nothing if it has not."""
    numba = sys.modules.get("numba")
    with contextlib.suppress(AttributeError, ValueError):  # not imported; no loop has run
        return str(numba.threading_layer())  # type: ignore[union-attr]
    return ""


def fail(result: Any, error: Exception) -> None:
    """Who waits for this result of a pool gets the error."""
    with contextlib.suppress(KeyError):  # all of it has come meanwhile
        if hasattr(result, "_set_length"):  # of imap
            result._set(result._index, (False, error))
            result._set_length(result._index)
        else:
            result._number_left = 1  # of map: there are no more to wait for
            result._set(0, (False, error))


def when_pools_are_broken(end: Callable[[], None]) -> None:
    """For a handler of a signal: calls `end` soon if that has ended workers of a pool too that a thread waits for."""
    waits = waits_for_pools()
    # One that has died of something else is not the signal's.
    workers = [each for pool in waits.values() for each in pool._pool if each.exitcode in (None, *BY_SIGNAL)]
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
