"""The keeper's watch over its host's workers: one whose heartbeat stands still is asked for its stacks, and killed.

What started the workers (Ray, torchrun) sees one die then, and does what it does with any that dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

from raytrain.errors import EXIT_FAILED, is_ours, is_users
from raytrain.keeper.channel import Channel
from raytrain.keeper.client import query
from raytrain.keeper.heartbeat import BEAT_NS, PHASES, REDUCE, REST, STEP
from raytrain.keeper.heartbeat import PHASE as PHASE_WORD
from raytrain.keeper.shared_memory import HEARTBEAT_WORDS, HEARTBEATS, StatusTable
from raytrain.storage.processes import DUMP, descendants_of, started_at, status_of, wait_channel_of
from raytrain.storage.storage import open_storage

LOOK_S = 0.5
WAIT_FACTOR = 1.5  # whoever waits for other hosts has so much longer than these: their keepers come first
DUMP_S, QUIET_S = 5.0, 0.2  # so long a worker's processes may take to write stacks; one that pauses has done so
SHOWN = 6  # calls of the user's in a message
MOST_BYTES = 256 * 1024  # of stacks
KILLED = "It was killed because it made no progress for SCALE.HANG_TIMEOUT seconds."


@dataclasses.dataclass
class WatchedWorker:
    """A worker of this host, by its process and when that began; `thread` is the one that trains.

    beat:    of its heartbeat, when that was last looked at
    still_s: seconds that it has been seen to stand still since
    """

    rank: int
    pid: int
    started: str
    thread: int
    timeout_s: float | None
    place: int
    stacks: int
    words: memoryview
    added: float
    beat: int = 0
    still_s: float = 0.0

    @property
    def phase(self) -> str:
        return PHASES[self.words[PHASE_WORD]]

    @property
    def step(self) -> int:
        return self.words[STEP]

    @property
    def lives(self) -> bool:
        return started_at(self.pid) == self.started

    @property
    def is_stopped(self) -> bool:
        return status_of(self.pid, "State").startswith("T")

    @property
    def waits(self) -> bool:
        """For the others, as far as it says."""
        return self.phase == REDUCE and not self.is_stopped

    def has_moved(self, passed_s: float) -> bool:
        """Whether it has made progress since the last look."""
        moved = self.words[BEAT_NS] != self.beat
        self.beat = self.words[BEAT_NS]
        free = moved or self.phase == REST or status_of(self.pid, "TracerPid") not in ("0", "")  # a debugger holds it
        self.still_s = 0.0 if free else self.still_s + passed_s
        return moved


@dataclasses.dataclass(frozen=True)
class Hang:
    """A worker that was killed for it.

    report: rank, step, phase, message (a line), calls (the user's that it was in, innermost first)
    at:     when, by the monotonic clock
    stacks: of all its threads and its loader workers, as text
    """

    report: dict[str, Any]
    at: float
    stacks: str


class Watchdog:
    """Looks at the heartbeats of this host's workers.

    hangs: what became of those that hung, until workers that were started after that make progress
    """

    def __init__(self, status: StatusTable, run_uri: str) -> None:
        self._status, self._run_uri = status, run_uri
        self._watched: dict[Channel, WatchedWorker] = {}
        self._looked = time.monotonic()
        self.hangs: list[Hang] = []
        threading.Thread(target=self._look_often, name="raytrain-watchdog", daemon=True).start()

    def add(self, channel: Channel, stacks: int, **worker: Any) -> int:
        """The place of its heartbeat in the status table."""
        taken = {each.place for each in self._watched.values()}
        place = next(place for place in range(HEARTBEATS) if place not in taken)
        words = self._cleared(place)
        self._watched[channel] = WatchedWorker(
            **worker, place=place, stacks=stacks, words=words, added=time.monotonic(), beat=words[BEAT_NS]
        )
        return place

    def drop(self, channel: Channel) -> None:
        """That worker is gone."""
        gone = self._watched.pop(channel, None)
        if gone is not None:
            self._cleared(gone.place)
            os.close(gone.stacks)

    def _cleared(self, place: int) -> memoryview:
        words = self._status.heartbeat(place)
        for word in range(HEARTBEAT_WORDS):
            words[word] = 0
        return words

    def _look_often(self) -> None:
        while True:
            time.sleep(LOOK_S)
            with contextlib.suppress(OSError):  # a process that is looked at may end meanwhile
                self._look(time.monotonic())

    def _look(self, now: float) -> None:
        # If this process was itself kept from running, so were the workers, perhaps: that is no hang.
        passed_s, self._looked = min(now - self._looked, 2 * LOOK_S), now
        watched = list(self._watched.values())
        if all(each.is_stopped for each in watched):  # somebody has suspended the run (Ctrl-Z), and will let it go on
            return
        for each in watched:
            if each.has_moved(passed_s):
                self.hangs = [hang for hang in self.hangs if hang.at > each.added]
        culprits = culprits_of(watched)
        for each in culprits:
            self._end(each)
        if culprits:
            for each in watched:  # they wait for what is to come instead
                each.still_s = 0.0

    def _end(self, worker: WatchedWorker) -> None:
        if not worker.lives:
            return
        hang = hang_of(worker)
        self.hangs.append(hang)
        if worker.lives:
            os.kill(worker.pid, signal.SIGKILL)
        # Beside this thread: the storage may be the very thing that hangs.
        threading.Thread(target=self._write, args=[hang], daemon=True).start()

    def _write(self, hang: Hang) -> None:
        with contextlib.suppress(Exception):  # what matters is told to the workers that come after
            open_storage(self._run_uri).write_bytes(file_of(hang.report["rank"]), hang.stacks.encode())


def file_of(rank: int) -> str:
    """Below the run folder, where all stacks of a worker that hung are."""
    return f"logs/hang_rank_{rank}.txt"


def culprits_of(watched: Sequence[WatchedWorker]) -> list[WatchedWorker]:
    """Those that have stood still for too long and keep the others waiting.

    Who stands in reduce waits for the others, unless it is stopped or they are ahead of it. If all wait, they do so for
    another host, whose keeper waits WAIT_FACTOR times less long.
    """
    furthest = max((each.step for each in watched if each.phase != REST), default=0)
    late = [each for each in watched if each.timeout_s is not None and each.still_s > each.timeout_s]
    held = [each for each in late if not each.waits or each.step < furthest]
    if held:
        first = min((each.step, each.waits) for each in held)
        return [each for each in held if (each.step, each.waits) == first]
    return [each for each in late if each.still_s > WAIT_FACTOR * (each.timeout_s or 0.0)]


def hang_of(worker: WatchedWorker) -> Hang:
    """What there is to tell of a worker that stands still."""
    phase, still_s, state = worker.phase, worker.still_s, state_of(worker.pid)
    stacks = [] if worker.is_stopped else dumped(worker)
    calls = calls_of(stacks, worker.thread)
    where = f", in {calls[0]}" if calls else ""
    message = (
        f"rank {worker.rank} (process {worker.pid} on {socket.gethostname()}) hung: no progress for {still_s:.0f} s "
        f"in {phase} at step {worker.step}{where}{state}"
    )
    report = {"rank": worker.rank, "step": worker.step, "phase": phase, "message": message, "calls": calls[:SHOWN]}
    return Hang(report, time.monotonic(), f"{time.strftime('%F %T')} {message}\n\n" + "\n".join(stacks))


def state_of(pid: int) -> str:
    """What explains why a process stands still, from the system's view; nothing if that says nothing."""
    state = status_of(pid, "State")
    if state.startswith("T"):
        return "; the process was stopped (SIGSTOP), so that there is no stack of it"
    if state.startswith("D"):
        where = wait_channel_of(pid) or "state D"
        return f"; the system holds it ({where}): most often a disk or a network file system does not answer"
    return ""


def dumped(worker: WatchedWorker) -> list[str]:
    """The stacks of the process, then those of its loader workers, one text each; those that come in time."""
    until, at, texts = time.monotonic() + DUMP_S, 0, []
    for pid in (worker.pid, *descendants_of(worker.pid)):
        if answers_dump(pid):
            with contextlib.suppress(OSError):
                os.kill(pid, DUMP)
            end = quiet_at(worker.stacks, at, until)
            texts.append(os.pread(worker.stacks, min(end - at, MOST_BYTES), at).decode(errors="replace"))
            at = end
    return texts


def quiet_at(stacks: int, size: int, until: float) -> int:
    """The size of the file once it has grown beyond `size` and then paused, or at that time of the monotonic clock."""
    quiet_from = until
    while (now := time.monotonic()) < min(until, quiet_from):
        time.sleep(0.02)
        if (grown := os.fstat(stacks).st_size) > size:
            size, quiet_from = grown, now + QUIET_S
    return size


def answers_dump(pid: int) -> bool:
    """Whether a process writes its stacks at DUMP; any other would die of it."""
    return bool(int(status_of(pid, "SigCgt") or "0", 16) >> (DUMP - 1) & 1)


def calls_of(stacks: Sequence[str], thread: int) -> list[str]:
    """The user's calls in what faulthandler wrote, innermost first; raytrain's innermost ones if there are none.

    stacks: as of `dumped`.   Of the thread that trains, else of a loader worker.
    """
    own, *loaders = map(threads_of, stacks or [""])
    training = own.get(thread, [])
    for frames in (training, *(frames for loader in loaders for frames in loader.values())):
        calls = next((index for index, (file, *_) in enumerate(frames) if is_ours(file)), 0)  # those that ours made
        users = [frame for frame in frames[:calls] if is_users(frame[0])]
        if users:
            return [shown(*frame) for frame in users]
    return [shown(*frame) for frame in training if is_ours(frame[0])][:2]


HEAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)[^\n]*\n((?:  [^\n]*\n?)*)", re.MULTILINE)
FRAME = re.compile(r'^  File "(.*)", line (\S+) in (.*)$', re.MULTILINE)


def threads_of(text: str) -> dict[int, list[tuple[str, str, str]]]:
    """By thread, (file, line, function) of each frame, innermost first."""
    return {int(head, 16): FRAME.findall(body) for head, body in HEAD.findall(text)}


def shown(file: str, line: str, function: str) -> str:
    return f"{function} ({file}:{line})"


def hangs_here(run_uri: str) -> list[dict[str, Any]]:
    """Hang.report of the workers that this host's keeper has killed since workers last made progress."""
    return list(query(run_uri, "hangs").get("hangs", ()))


def failure_by(hang: dict[str, Any], run_uri: str) -> dict[str, Any]:
    """What the failure screen shows of it."""
    text = "\n".join([hang["message"], *(f"  called by {call}" for call in hang["calls"][1:]), "", KILLED])
    at, logs = {"rank": hang["rank"], "step": hang["step"]}, f"{run_uri}/{file_of(hang['rank'])}"
    return {**at, "error": text, "traceback": text, "logs": logs, "exit_status": EXIT_FAILED, "expected": False}
