"""When an elastic run is to have more workers, or fewer since others have a share too."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

from raytrain.cluster.ray_worker import is_fit


class Growth:
    """Looks for room for more workers every so many seconds, in a thread of its own: it takes some."""

    def __init__(self, seats: Any, every_s: float, run_uri: str) -> None:
        self._seats, self._every_s, self._run_uri = seats, every_s, run_uri
        self._next_at = time.monotonic() + every_s
        self._thread: threading.Thread | None = None
        self._has_grown = False

    def has_too_many(self, num_workers: int) -> bool:
        """Whether this trial of a sweep is to have fewer than these, for others to train beside it."""
        return num_workers > int(self._seats.limit)

    def is_ready(self, num_workers: int, now: float) -> bool:
        """Whether more than these could train at once; to be called until it says so."""
        if self._thread is None:
            if now > self._next_at:
                self._thread = threading.Thread(
                    target=self._look, args=[num_workers], name="raytrain-growth", daemon=True
                )
                self._thread.start()
            return False
        if self._thread.is_alive():
            return False
        self._thread, self._next_at = None, now + self._every_s
        return self._has_grown

    def _look(self, num_workers: int) -> None:
        self._has_grown = False
        self._has_grown = self._seats.grow(num_workers, functools.partial(is_fit, self._run_uri))

    def take_notes(self) -> list[str]:
        """What it has found that a user should know, once."""
        notes, self._seats.notes = self._seats.notes, []
        return list(notes)
