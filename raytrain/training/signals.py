"""SIGINT and SIGTERM wish that the run stops. Known before torch is imported, which takes a second."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from raytrain.storage.forks import handle_signals
from raytrain.storage.pools import when_pools_are_broken

TWICE_S = 0.3  # a signal that comes again within that is the same one; those of `timeout` are microseconds apart


@contextlib.contextmanager
def signals_wish_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one ends this process as it always would.

    Not one within TWICE_S of it: `timeout` signals its command, and then the group that this is in.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first_at: float | None = None

    def wish(number: int, frame: Any) -> None:
        nonlocal first_at
        if first_at is None:
            first_at = time.monotonic()  # before the lock of `stop`, for which a second signal in there would wait
            stop.set()
            when_pools_are_broken(end_now)
        elif time.monotonic() - first_at > TWICE_S:
            for each, handler in kept.items():
                signal.signal(each, handler)
            signal.raise_signal(number)

    handle_signals(dict.fromkeys(kept, wish))
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def end_now() -> None:
    """As a second signal does."""
    print(
        "raytrain: the signal went to a pool of the task too, and ended processes whose results are waited for. "
        "The run ends at its newest state, from which the same command goes on",
        file=sys.stderr,
    )
    os.kill(os.getpid(), signal.SIGTERM)
