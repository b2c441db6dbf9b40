"""How many workers each trial of a sweep may have where trials are elastic: a fair share of what the cluster has.

The sweep's process says so again and again, in the mailbox, and a trial's own takes and gives up workers by it.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from raytrain.cluster.mailbox import Mailbox
from raytrain.cluster.seats import room_for_all, worthwhile_sizes

SHARES = "shares"  # in the mailbox, by trial
LOOK_S = 1.0  # how often it is looked what the cluster has
LOOKS = 3  # of which the middle one counts: Ray tells late, by some tenths of a second, of what is given up and taken
NAMED_S, NAMED_POLL_S = 5.0, 0.05  # so long a trial that begins waits for its share, which Ray Tune's loop asks for


def fair_shares(room: int, trials: Sequence[int], sizes: Sequence[int], before: Mapping[int, int]) -> dict[int, int]:
    """By trial, how many of `room` workers it may have: the one with fewest gets more first, as long as any can.

    sizes:  that are worth having, the fewest first, which each trial has in any case
    before: shares so far: of trials that are equal the one with more has more again, so that few have to change
    """
    ranked = sorted(trials, key=lambda trial: (-before.get(trial, 0), trial))
    level = dict.fromkeys(ranked, 0)
    left = room - len(ranked) * sizes[0]
    while True:
        for trial in sorted(ranked, key=lambda trial: level[trial]):  # a stable order
            higher = level[trial] + 1
            if higher < len(sizes) and sizes[higher] - sizes[higher - 1] <= left:
                left -= sizes[higher] - sizes[higher - 1]
                level[trial] = higher
                break
        else:
            return {trial: sizes[level[trial]] for trial in trials}


class Quota:
    """Says in `mailbox` what each trial may have, in a thread, for the time of a block.

    A share becomes smaller at once, when another trial is to begin, and larger once that has held from one look at
    the cluster to the next: between two trials there is a moment with one fewer.
    """

    def __init__(
        self, mailbox: Mailbox, per_worker: Mapping[str, float], least: int, most: int, num_virtual: int
    ) -> None:
        self._mailbox, self._per_worker = mailbox, per_worker
        self._sizes = worthwhile_sizes(least, most, num_virtual)
        self._rooms = deque[int](maxlen=LOOKS)
        self._trials: tuple[int, ...] = ()
        self._told: dict[int, int] = {}
        self._at_last_look: dict[int, int] = {}
        self._failure: BaseException | None = None
        self._wake, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="raytrain-quota", daemon=True)

    def __enter__(self) -> Quota:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._wake.set()
        self._thread.join()

    def claim(self, trials: Sequence[int]) -> None:
        """These train now, or are to begin as soon as there is room."""
        if self._failure is not None:
            raise self._failure
        if tuple(trials) != self._trials:
            self._trials = tuple(trials)
            self._wake.set()

    def _run(self) -> None:
        try:
            look_at = 0.0
            while not self._is_over:
                if is_look := time.monotonic() > look_at:
                    self._rooms.append(room_for_all(self._per_worker))
                    look_at = time.monotonic() + LOOK_S
                self._tell(is_look)
                self._wake.wait(max(0.0, look_at - time.monotonic()))
                self._wake.clear()
        except BaseException as failure:
            self._failure = failure

    def _tell(self, is_look: bool) -> None:
        shares = fair_shares(int(statistics.median_low(self._rooms)), self._trials, self._sizes, self._told)
        told = {trial: min(share, self._at_last_look.get(trial, share)) for trial, share in shares.items()}
        if is_look:
            self._at_last_look = shares
        if told != self._told:
            self._told = told
            self._mailbox.put(SHARES, told)


def share_of(trial: int, launch: str, least: int) -> Callable[[], int]:
    """Asks what this trial may have. Returns once that is known, as it is a moment after the trial has begun."""

    def share() -> int:
        shares: Mapping[str, int] = mailbox.get(SHARES) or {}
        return shares.get(str(trial), least)

    mailbox, give_up = Mailbox(launch), time.monotonic() + NAMED_S
    while str(trial) not in (mailbox.get(SHARES) or {}) and time.monotonic() < give_up:
        time.sleep(NAMED_POLL_S)
    return share
