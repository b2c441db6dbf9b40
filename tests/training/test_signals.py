"""A wish to stop by signals."""

from __future__ import annotations

import os
import signal
import time

from commands import alive, wait_for

from raytrain.training.signals import signals_wish_stop

SIGNALS_SENT = 200  # within a few milliseconds


def wait_for_stop(ready: int) -> None:
    with signals_wish_stop() as stop:
        os.write(ready, b"!")
        while not stop.is_set():
            time.sleep(0.001)
        time.sleep(0.02)  # the rest of them
        os._exit(7)


def test_signals_that_come_at_once_are_one_wish() -> None:
    """As `timeout` sends two. The second one was taken for a later one, or waited for a lock that the first held."""
    for _ in range(20):
        here, there = os.pipe()
        if (pid := os.fork()) == 0:
            wait_for_stop(there)
        os.read(here, 1)
        for _ in range(SIGNALS_SENT):
            if not alive(pid):
                break
            os.kill(pid, signal.SIGTERM)
        for end in (here, there):
            os.close(end)
        try:
            wait_for(lambda pid=pid: not alive(pid), "the stop", deadline_s=5)  # type: ignore[misc]
        finally:
            os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
