"""Ctrl-Z stops all of a run, and `fg` has all of it go on.

The terminal stops its foreground process group: the driver and Ray's daemons, which are of it. Ray starts each worker
in a group of its own, so the driver passes it on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from raytrain.storage.processes import descendants_of


@contextlib.contextmanager
def suspended_together() -> Iterator[None]:
    """In the block, what stops this process by SIGTSTP stops all processes below it too, until it goes on.

    Nothing where this process answers that signal in a way of its own, or is not in its main thread.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


def suspend(number: int, frame: Any) -> None:
    """Returns once somebody has this process go on; at once where there is no shell that could."""
    stopped: set[int] = set()
    while started := set(descendants_of(os.getpid())) - stopped:  # again, since one may have started others meanwhile
        send_all(started, signal.SIGSTOP)
        stopped |= started
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTSTP)  # to this very thread, so it does not return before
    signal.signal(signal.SIGTSTP, suspend)
    send_all(stopped, signal.SIGCONT)


def send_all(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, or is another user's
            os.kill(pid, number)
