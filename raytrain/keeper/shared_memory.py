"""What workers and the keeper of their host share: memory, and a line to talk over.

The memory has no name in any folder (memfd): it is gone with the last process that has it. The line is a
socket in the kernel's own namespace; only processes of the same user are answered.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import raytrain
from raytrain.errors import PreflightError
from raytrain.progress import Progress
from raytrain.storage.processes import closed_in_forks, is_stopped

SLOTS = 4  # newest, in flight, the one that is filled, and a save that waits
USED_SLOTS = 3  # as long as the writer keeps up
MADV_POPULATE_READ = 22  # module mmap does not know it yet
FETCH_BYTES = 4 << 20  # a few milliseconds, in which no other thread of the interpreter runs
PAGE = 4096
BOARD_BYTES = 64 * 1024
WORD = 8
LINE = 8  # words in a cache line
FIRST_SLOT = LINE  # word number; the first line counts what the keeper has answered
FIRST_PULSE, PULSE_WORDS = 64 * LINE, 2 * LINE
PULSES = (BOARD_BYTES // WORD - FIRST_PULSE) // PULSE_WORDS  # so many workers can be watched on a host
START_S = 60.0
ANSWER_S = 5.0
SAVE_S = 900.0  # so long a keeper that ends may take to save what it holds


def is_possible() -> bool:
    """Whether this system has what a keeper needs: Linux does."""
    return hasattr(os, "memfd_create") and sys.platform == "linux"


class Board:
    """A few numbers that workers and keeper see as soon as they are written.

    answers: how many answers the keeper has sent; who waits for one looks here, not at the socket
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._words = memoryview(mmap.mmap(descriptor, BOARD_BYTES)).cast("q")

    @classmethod
    def made(cls) -> Board:
        descriptor = os.memfd_create("raytrain-board")
        os.ftruncate(descriptor, BOARD_BYTES)
        return cls(descriptor)

    @property
    def answers(self) -> int:
        return self._words[0]

    def answered(self) -> None:
        self._words[0] += 1

    def begin(self, slot: int) -> None:
        """From now on nothing in this slot counts."""
        self._words[FIRST_SLOT + slot * LINE] = 0

    def commit(self, slot: int, progress: Progress, size_bytes: int) -> None:
        """The slot holds a whole checkpoint.pth, and is the newest one."""
        at = FIRST_SLOT + slot * LINE
        newest = max(self._words[FIRST_SLOT + s * LINE] for s in range(SLOTS))
        for offset, value in enumerate((progress.epoch, progress.cursor, progress.step, size_bytes), start=1):
            self._words[at + offset] = value
        self._words[at] = newest + 1

    def newest(self) -> int | None:
        """The slot that was committed last; None if none is whole."""
        turn, slot = max((self._words[FIRST_SLOT + s * LINE], s) for s in range(SLOTS))
        return slot if turn else None

    def progress(self, slot: int) -> Progress:
        at = FIRST_SLOT + slot * LINE
        return Progress(*self._words[at + 1 : at + 4])

    def size_bytes(self, slot: int) -> int:
        return self._words[FIRST_SLOT + slot * LINE + 4]

    def read_by(self, slot: int, change: int) -> None:
        """So many more, or fewer, saves are to be written from this slot. The keeper's to say."""
        self._words[FIRST_SLOT + slot * LINE + 5] += change

    def is_read(self, slot: int) -> bool:
        """Whether the keeper has still to write what is in this slot, for workers that may be dead by now."""
        return self._words[FIRST_SLOT + slot * LINE + 5] > 0

    def pulse(self, place: int) -> memoryview:
        """The words in which the worker at this place says what it is at (keeper/heartbeat.py)."""
        return self._words[FIRST_PULSE + place * PULSE_WORDS :][:PULSE_WORDS]

    def pulses(self) -> list[memoryview]:
        """Those of all places, taken or not."""
        return [self.pulse(place) for place in range(PULSES)]

    def forget_all_but(self, kept: int | None) -> None:
        """No other slot is whole any more."""
        for slot in range(SLOTS):
            if slot != kept:
                self.begin(slot)


class Slots:
    """SLOTS pieces of shared memory, each with room for `slot_bytes` of a checkpoint.pth, at whole pages."""

    def __init__(self, descriptor: int, slot_bytes: int) -> None:
        self.descriptor, self.slot_bytes = descriptor, slot_bytes
        weakref.finalize(self, os.close, descriptor)  # else the memory would be taken for as long as this process lives
        self.memory = mmap.mmap(descriptor, SLOTS * slot_bytes)

    @classmethod
    def made(cls, size_bytes: int) -> Slots:
        """With some room to grow; memory is taken when it is first written."""
        slot_bytes = -(-(size_bytes + size_bytes // 16) // PAGE) * PAGE
        descriptor = os.memfd_create("raytrain-slots")
        os.ftruncate(descriptor, SLOTS * slot_bytes)
        return cls(descriptor, slot_bytes)

    def fetch(self, are_wanted: Callable[[], bool]) -> None:
        """Take the memory of those that every run uses from the system before anyone waits for it.

        What is in them stays as it is: they may be filled meanwhile.
        """
        used_bytes = USED_SLOTS * self.slot_bytes
        with contextlib.suppress(OSError):  # there is none: whoever fills them is told
            for start in range(0, used_bytes, FETCH_BYTES):
                if not are_wanted():
                    return
                self.touch(start, min(FETCH_BYTES, used_bytes - start))

    def touch(self, start: int, size_bytes: int) -> None:
        """Have this stretch in memory, and within this process's reach; OSError if there is no memory for it.

        A read maps 16 pages at a fault, a write one: of 605 MB that another process has fetched 0.05 s, not 0.2.
        """
        try:
            self.memory.madvise(MADV_POPULATE_READ, start, size_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.posix_fallocate(self.descriptor, start, size_bytes)  # Linux before 5.14

    def view(self, slot: int, size_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return memoryview(self.memory)[start : start + size_bytes]


class Line:
    """One end of the talk between a worker and the keeper: dicts as JSON, and file descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self.peer, _ = peer_of(sock)
        self._connection = Connection(sock.detach())
        closed_in_forks(self._connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    def say(self, **message: Any) -> None:
        """OSError if the other end is gone."""
        self._connection.send_bytes(json.dumps(message).encode())

    def hear(self) -> dict[str, Any]:
        """The next message; EOFError or OSError if the other end is gone."""
        heard: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return heard

    def hear_within(self, timeout_s: float) -> dict[str, Any]:
        """As `hear`, of a keeper; PreflightError if it is stopped, or says nothing for so long."""
        until = time.monotonic() + timeout_s
        while not self.hears(min(ANSWER_S, timeout_s)):
            stopped = is_stopped(self.peer)
            if stopped or time.monotonic() > until:
                why = "is stopped (SIGSTOP)" if stopped else f"has not answered for {timeout_s:g} s"
                raise PreflightError(
                    f"process {self.peer}, the keeper of this run's newest state, {why}. `kill -CONT {self.peer}` "
                    f"lets it go on, and save that; `kill -9 {self.peer}` gives up what is in no checkpoint. "
                    "Then run the same command again"
                )
        return self.hear()

    def hears(self, timeout_s: float = 0.0) -> bool:
        """Whether a message, or the end, is there."""
        return self._connection.poll(timeout_s)

    def give(self, descriptor: int) -> None:
        reduction.send_handle(self._connection, descriptor, None)

    def take(self) -> int:
        return int(reduction.recv_handle(self._connection))

    def close(self) -> None:
        self._connection.close()


def address_of(run_uri: str) -> str:
    """Where the keeper of a run folder listens on this host, by whichever links the folder is named."""
    place = run_uri if "://" in run_uri else os.path.realpath(run_uri)
    return f"\0raytrain-{os.getuid()}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:24]}"


def connected(run_uri: str) -> Line | None:
    """A line to this run folder's keeper on this host; None if there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(address_of(run_uri))
    except OSError:
        sock.close()
        return None
    if not is_own(sock):
        sock.close()
        return None
    return Line(sock)


def is_own(sock: socket.socket) -> bool:
    """Whether the process at the other end is this user's."""
    return peer_of(sock)[1] == os.getuid()


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; of a keeper, the process that called listen last."""
    pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def started(run_uri: str, launch: str) -> Line:
    """A line to the keeper of this run folder, which is started if there is none."""
    line = connected(run_uri)
    if line is None:
        # It leaves this process's family at once: Ray ends the children of its workers with them.
        package = str(Path(raytrain.__file__).parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "raytrain.keeper.keeper", run_uri, launch]
        with subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                _, told = process.communicate(timeout=START_S)
            except subprocess.TimeoutExpired:  # else leaving this block would wait for it without end
                process.kill()
                told = f"it took more than {START_S:g} s".encode()
        line = connected(run_uri)
        if line is None:
            raise OSError(f"the keeper of {run_uri} did not start: {told.decode(errors='replace').strip()[-2000:]}")
    return line


def asked(run_uri: str, op: str) -> dict[str, Any]:
    """What the keeper of this run folder on this host answers; empty if there is none, or it takes too long."""
    line = connected(run_uri) if is_possible() else None
    if line is None:
        return {}
    with contextlib.closing(line), contextlib.suppress(EOFError, OSError):
        line.say(op=op)
        if line.hears(ANSWER_S):
            return line.hear()
    return {}


def held(run_uri: str) -> Progress | None:
    """Where the newest state stands that is in memory on this host for this run folder; None if there is none."""
    found = asked(run_uri, "newest").get("newest")
    return Progress(*found) if found else None


def take_over(run_uri: str, patience_s: float) -> None:
    """Nobody keeps this run folder on this host any more: the newest state that was kept is in its checkpoints.

    Returns without that if workers still train there after patience_s. PreflightError if the keeper does not answer,
    or cannot save it.
    """
    line = connected(run_uri) if is_possible() else None
    if line is None:
        return
    try:
        line.say(op="take_over", patience_s=patience_s)
        told = line.hear_within(patience_s + SAVE_S)  # that workers train there, or the end
        if "unsaved" in told:
            raise PreflightError(
                f"{run_uri}: the state after step {told['step']} stands in the memory of process {line.peer} only, "
                f"which could not save it: {told['unsaved']}\nIt tries again every few seconds and at the next launch. "
                f"`kill -9 {line.peer}` gives up what is in no checkpoint"
            )
    except (EOFError, OSError):
        return
    finally:
        line.close()
