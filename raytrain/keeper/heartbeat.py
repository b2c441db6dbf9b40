"""What each rank of a run is at, in memory that the keeper of its host looks at: a few writes a step."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from raytrain.keeper.client import KeeperClient
from raytrain.keeper.shared_memory import HEARTBEAT_WORDS, StatusTable
from raytrain.storage.processes import path_of_descriptor, started_at, write_stacks_to

PHASES = ("rest", "data", "forward", "backward", "reduce", "checkpoint", "eval")
REST, DATA, FORWARD, BACKWARD, REDUCE, CHECKPOINT, EVAL = PHASES
NUMBER = {phase: number for number, phase in enumerate(PHASES)}
OWN_WORK = (DATA, FORWARD, BACKWARD)  # what every rank does by itself, for its virtual workers
# Words of a heartbeat: when it last beat, then what it says of its rank, which counts from 1 (0: nobody).
BEAT_NS, STEP, PHASE, RANK, PID, SHARE = range(6)
BUSY_NS = 8  # the first of a word for each phase, in a cache line of their own

WINDOW_STEPS, WINDOW_S = 100, 10.0  # at least so long ranks are compared at a time
WINDOWS = 3  # in a row in which the same rank is slow, before that is told
SLOW_FACTOR, SLOW_S = 1.5, 0.002  # against the middle one of all ranks: times as long a step, and by so much


class Heartbeat:
    """Tells which step this rank is at, in which phase, and since its start how long it was in each.

    The keeper kills a rank whose heartbeat stands still, except at rest: call `beat` again within a long one.

    stragglers: on rank 0 of a run that is watched
    """

    stragglers: Stragglers | None = None

    def __init__(self, words: memoryview | None = None) -> None:
        """words: HEARTBEAT_WORDS int64 of the status table; None where nobody looks."""
        self._words = memoryview(bytearray(8 * HEARTBEAT_WORDS)).cast("q") if words is None else words
        self._busy, self._since_ns = BUSY_NS + NUMBER[REST], time.perf_counter_ns()

    def step(self, step: int) -> None:
        """The step under way from now on, counted from 1."""
        self._words[STEP] = step

    def beat(self, phase: str) -> None:
        """What this rank does from now on: one of PHASES."""
        now_ns, words, number = time.perf_counter_ns(), self._words, NUMBER[phase]
        words[self._busy] += now_ns - self._since_ns
        words[PHASE] = number
        words[BEAT_NS] = self._since_ns = now_ns
        self._busy = BUSY_NS + number


class Stacks:
    """Memory that this process, and its loader workers, write the stacks of all threads to when they get DUMP.

    path: where processes of this host find it
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("raytrain-stacks")
        self.path = path_of_descriptor(os.getpid(), self.descriptor)
        write_stacks_to(self.path)


def start_heartbeat(keeper: KeeperClient, stacks: Stacks, rank: int, share: int, timeout_s: float | None) -> Heartbeat:
    """This process's heartbeat, at which its keeper looks from now on.

    share: virtual workers of this rank.   timeout_s: without progress; None for ever
    """
    pid = os.getpid()
    thread = threading.get_ident()
    keeper.channel.send(op="watch", rank=rank, pid=pid, started=started_at(pid), thread=thread, timeout_s=timeout_s)
    keeper.channel.send_descriptor(stacks.descriptor)
    words = keeper.status.heartbeat(keeper.channel.receive()["place"])
    for word, value in {PID: pid, SHARE: share, RANK: rank + 1}.items():
        words[word] = value
    return Heartbeat(words)


class Means(NamedTuple):
    """Of one rank over some steps: its process, and by phase the mean seconds a step for one virtual worker."""

    pid: int
    phases_s: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.phases_s.values())


class Stragglers:
    """Finds ranks of this host that are slower than the others for long, each once. Time is what they do by themselves.

    On a GPU that is the host's time, so a slow GPU is not seen.
    """

    def __init__(self, status: StatusTable, now: float) -> None:
        self._status = status
        self._steps, self._since = 0, now
        self._before = self._read()
        self._in_a_row: dict[int, int] = {}

    def warnings(self, now: float) -> list[str]:
        """Ask once after each step: what is to be told. now: seconds of any clock."""
        self._steps += 1
        if self._steps < WINDOW_STEPS or now - self._since < WINDOW_S:
            return []
        before, self._before = self._before, self._read()
        means = {rank: self._means(before[rank], words) for rank, words in self._before.items() if rank in before}
        self._steps, self._since = 0, now
        return list(self._judge(means))

    def _judge(self, means: Mapping[int, Means]) -> Iterable[str]:
        if len(means) < 2:
            return
        # Of two the faster one is the middle: the slow one must not be what it is measured by.
        middle_s = statistics.median_low(each.total_s for each in means.values())
        middle = next(each for each in means.values() if each.total_s == middle_s)
        for rank, each in means.items():
            slow = each.total_s > SLOW_FACTOR * middle_s and each.total_s > middle_s + SLOW_S
            self._in_a_row[rank] = self._in_a_row.get(rank, 0) + 1 if slow else 0
            if self._in_a_row[rank] == WINDOWS:
                worst = max(OWN_WORK, key=lambda phase: each.phases_s[phase] - middle.phases_s[phase])
                yield (
                    f"rank {rank} (process {each.pid}) is slower than the others: {1e3 * each.total_s:.1f} ms a step, "
                    f"{each.total_s / max(middle_s, 1e-9):.1f} times as long, most of that in {worst}. "
                    "Every step waits for it"
                )

    def _means(self, before: list[int], after: list[int]) -> Means:
        count = self._steps * max(after[SHARE], 1)
        spent_ns = {phase: after[BUSY_NS + NUMBER[phase]] - before[BUSY_NS + NUMBER[phase]] for phase in OWN_WORK}
        return Means(after[PID], {phase: ns / 1e9 / count for phase, ns in spent_ns.items()})

    def _read(self) -> dict[int, list[int]]:
        """The words of each rank's heartbeat."""
        return {words[RANK] - 1: words for words in map(list, self._status.heartbeats()) if words[RANK]}
