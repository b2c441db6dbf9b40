"""The memory that workers and the keeper of their host share.

It has no name in any folder (memfd): it is gone with the last process that has it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import weakref
from collections.abc import Callable

from raytrain.progress import Progress

SLOTS = 4  # newest, in flight, the one that is filled, and a save that waits
USED_SLOTS = 3  # as long as the writer keeps up
MADV_POPULATE_READ = 22  # module mmap does not know it yet
FETCH_BYTES = 4 << 20  # a few milliseconds, in which no other thread of the interpreter runs
PAGE = 4096
STATUS_BYTES = 64 * 1024
WORD = 8
CACHE_LINE = 8  # words
FIRST_SLOT = CACHE_LINE  # word number; the first cache line counts what the keeper has answered
FIRST_HEARTBEAT, HEARTBEAT_WORDS = 64 * CACHE_LINE, 2 * CACHE_LINE
HEARTBEATS = (STATUS_BYTES // WORD - FIRST_HEARTBEAT) // HEARTBEAT_WORDS  # so many workers can be watched on a host


class StatusTable:
    """A few numbers that workers and keeper see as soon as they are written.

    answers: how many answers the keeper has sent; who waits for one looks here, not at the socket
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        self._words = memoryview(mmap.mmap(descriptor, STATUS_BYTES)).cast("q")

    @classmethod
    def made(cls) -> StatusTable:
        descriptor = os.memfd_create("raytrain-status")
        os.ftruncate(descriptor, STATUS_BYTES)
        return cls(descriptor)

    @property
    def answers(self) -> int:
        return self._words[0]

    def answered(self) -> None:
        self._words[0] += 1

    def begin(self, slot: int) -> None:
        """From now on nothing in this slot counts."""
        self._words[FIRST_SLOT + slot * CACHE_LINE] = 0

    def commit(self, slot: int, progress: Progress, size_bytes: int) -> None:
        """The slot holds a whole checkpoint.pth, and is the newest one."""
        at = FIRST_SLOT + slot * CACHE_LINE
        newest = max(self._words[FIRST_SLOT + s * CACHE_LINE] for s in range(SLOTS))
        for offset, value in enumerate((progress.epoch, progress.cursor, progress.step, size_bytes), start=1):
            self._words[at + offset] = value
        self._words[at] = newest + 1

    def newest(self) -> int | None:
        """The slot that was committed last; None if none is whole."""
        turn, slot = max((self._words[FIRST_SLOT + s * CACHE_LINE], s) for s in range(SLOTS))
        return slot if turn else None

    def progress(self, slot: int) -> Progress:
        at = FIRST_SLOT + slot * CACHE_LINE
        return Progress(*self._words[at + 1 : at + 4])

    def size_bytes(self, slot: int) -> int:
        return self._words[FIRST_SLOT + slot * CACHE_LINE + 4]

    def read_by(self, slot: int, change: int) -> None:
        """So many more, or fewer, saves are to be written from this slot. The keeper's to say."""
        self._words[FIRST_SLOT + slot * CACHE_LINE + 5] += change

    def is_read(self, slot: int) -> bool:
        """Whether the keeper has still to write what is in this slot, for workers that may be dead by now."""
        return self._words[FIRST_SLOT + slot * CACHE_LINE + 5] > 0

    def heartbeat(self, place: int) -> memoryview:
        """The words in which the worker at this place says what it is at (keeper/heartbeat.py)."""
        return self._words[FIRST_HEARTBEAT + place * HEARTBEAT_WORDS :][:HEARTBEAT_WORDS]

    def heartbeats(self) -> list[memoryview]:
        """Those of all places, taken or not."""
        return [self.heartbeat(place) for place in range(HEARTBEATS)]

    def forget_all_but(self, spared: int | None) -> None:
        """No other slot is whole any more."""
        for slot in range(SLOTS):
            if slot != spared:
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
