"""ray.init puts handlers of its own beneath Python's, which print a stack and abort: they go again."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator

WATCH_S = 0.002


def keep_signal_handlers() -> None:
    """What Python says of signals holds again beneath it, where Ray has put handlers of its own.

    signal_handlers_kept, which does so in another thread, may not know one that came meanwhile.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.getsignal(number))


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Beneath this process's handlers ray.init puts its own, which print a stack and abort: they go at once.

    Python would put back what it says of a signal only in the main thread, which does other things meanwhile.
    """
    libc, pointer_bytes = ctypes.CDLL(None), ctypes.sizeof(ctypes.c_void_p)
    size = 1024  # bytes, more than a struct sigaction has anywhere; its handler comes first
    kept = {number: ctypes.create_string_buffer(size) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, action in kept.items():
        libc.sigaction(number, None, action)
    known = {action.raw[:pointer_bytes] for action in kept.values()} | {bytes(pointer_bytes)}
    over = threading.Event()

    def put_back() -> None:
        now = ctypes.create_string_buffer(size)
        for number, action in kept.items():
            libc.sigaction(number, None, now)
            if now.raw[:pointer_bytes] in known:  # this process's own, perhaps another than before
                action.raw = now.raw
            else:
                libc.sigaction(number, action, None)

    def watch() -> None:
        while not over.wait(WATCH_S):
            put_back()

    watcher = threading.Thread(target=watch, name="raytrain-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        put_back()
