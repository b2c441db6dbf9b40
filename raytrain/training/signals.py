"""What asks this process to stop, as a wish that the run sees after the step under way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def signals_wish_stop() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one ends this process as it always would."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def wish(number: int, frame: Any) -> None:
        stop.set()
        for each, handler in kept.items():
            signal.signal(each, handler)

    for number in kept:
        signal.signal(number, wish)
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
