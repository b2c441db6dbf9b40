"""Processes that the user's code starts from one of a run, with module multiprocessing or by fork.

They answer signals as they would elsewhere, not as a training process does: a Pool ends its workers by SIGTERM and
waits for them, for ever if they have inherited a handler that only takes note. And they end with the process that
started them, however that ends.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from raytrain.storage.pools import break_pools

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def handle_signals(handlers: Mapping[signal.Signals, Callable[[int, Any], Any] | signal.Handlers]) -> None:
    """Set these handlers of SIGNALS, for this process and not for what it forks."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    held = threading.local()  # of the thread that forks

    def hold() -> None:  # or a signal would be lost that a child gets before it has changed its handlers
        held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)

    def reset() -> None:
        for number, handler in handlers.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else leave_to_parent)
        let_go()

    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=reset)


def leave_to_parent(number: int, frame: Any) -> None:
    """Handles Ctrl-C. No SIG_IGN: what this process starts would keep that."""


@functools.cache
def tend_forks() -> None:
    """From now on what multiprocessing forks from this process, and what is forked from that, becomes a `child`.

    And its pools break where they would stand still.
    """
    import multiprocessing.connection  # here, and not in each of them

    break_pools()
    multiprocessing.util.register_after_fork(tend_forks, lambda _: become_child())


def become_child() -> None:
    """This process is a worker of a pool, or the like, of the user's; nothing is done to a loader worker."""
    import torch  # it is there already: a process of a run has forked this one, or the fork server
    from torch.utils.data._utils.worker import _worker_loop

    if multiprocessing.current_process()._target is _worker_loop:  # type: ignore[attr-defined]
        return
    end_with_parent()
    # What is sent to the group (by a terminal, by `timeout`) is for its parent, which may need it to finish a step.
    os.setpgid(0, 0)
    if torch.get_num_threads() > 1:  # OpenMP's did not come along by fork, and would be waited for
        torch.set_num_threads(1)  # takes 2 ms
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # the fork server has them blocked


def end_with_parent() -> None:
    """From now on this process of module multiprocessing ends as soon as the one that started it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only called in such processes"

    def watch() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=watch, name="raytrain-parent-watch", daemon=True).start()


def end_children() -> None:
    """Kill what multiprocessing has started from here and is left at the end: its exit would wait for those for ever.

    An executor of concurrent.futures that nobody has shut down has such processes.
    """
    for child in multiprocessing.active_children():
        assert child.pid is not None, "it has been started"
        with contextlib.suppress(ProcessLookupError):  # of a fork server, which has buried it
            os.kill(child.pid, signal.SIGKILL)  # those of joblib have no kill()


def end_as_at_exit() -> None:
    """What module multiprocessing does as a process ends, done now: its children end, and its folder in /tmp goes.

    Whole each time it is called, and the process may start others after it: its fork server, which would be asked by a
    socket in that folder, ends too, and its word that it is ending is taken back, since queues then drop what fails.
    """
    from multiprocessing import forkserver  # here, and not in each command

    util: Any = multiprocessing.util
    util._exiting = False
    util._exit_function()
    util._exiting = False
    server: Any = forkserver._forkserver
    with server._lock:
        if server._forkserver_pid is None:
            return
        os.close(server._forkserver_alive_fd)  # which asks it to end; it waits for others that hold that too
        os.kill(server._forkserver_pid, signal.SIGKILL)
        os.waitpid(server._forkserver_pid, 0)
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None


def at_exit(function: Callable[[], None]) -> None:
    """Have it called when module multiprocessing ends this process, before it waits for what it has started."""
    finalize: Any = multiprocessing.util.Finalize  # not atexit, which is not for processes of multiprocessing
    finalize(None, function, exitpriority=0)  # after those of pools, which end theirs in their own way
