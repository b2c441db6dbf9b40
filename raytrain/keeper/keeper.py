"""The keeper of a run on one host: a small process that outlives workers and driver.

It holds the newest states of the run in memory, writes those to the run's checkpoints that are to be saved, and when
all that trained is gone, the newest one. Workers that are started again go on from what it holds. No torch: it starts
in a tenth of a second, and a state is the bytes of a checkpoint.pth to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any

from raytrain.errors import CheckpointError, StorageError
from raytrain.keeper.channel import Channel, is_own
from raytrain.keeper.client import address_of
from raytrain.keeper.shared_memory import Slots, StatusTable
from raytrain.keeper.watchdog import Watchdog
from raytrain.keeper.writer import Writer, WriteRequest
from raytrain.progress import Progress
from raytrain.storage.checkpoint import Manifest
from raytrain.storage.lock import JOURNAL, locked
from raytrain.storage.processes import host, started_at
from raytrain.storage.scratch import remove_abandoned
from raytrain.storage.storage import open_storage
from raytrain.storage.store import Store

TICK_S = 0.25
GRACE_S = 30.0  # so long workers may be away while their driver lives, or lives where it cannot be seen
LOCK_S = 40.0
SAVE_AGAIN_S, HOLD_S = 5.0, 3600.0  # between two tries to save the newest state; after so long it is given up


class Keeper:
    """Listens to the workers of one launch on this host."""

    def __init__(self, listener: socket.socket, run_uri: str, launch: str) -> None:
        self.listener, self.run_uri, self.launch = listener, run_uri, launch
        self.status = StatusTable.made()
        self.slots: Slots | None = None
        self.channels: list[Channel] = []
        self.replying = threading.Lock()
        self.workers: set[Channel] = set()
        self.description: dict[str, Any] = {}
        self.writer = Writer(self)
        self.watchdog = Watchdog(self.status, run_uri)
        self.alone_since = time.monotonic()
        self.waiting_launches: list[tuple[Channel, float]] = []
        self.held_since: float | None = None
        self.retry_at = 0.0

    def live(self) -> None:
        """Until the run has ended, or all that took part in it is gone."""
        while True:
            for ready in wait([self.listener, *self.channels], TICK_S):  # type: ignore[list-item]
                if ready is self.listener:
                    self.accept()
                elif isinstance(ready, Channel) and self.has_more(ready) and self.answer(ready):
                    return
            if self.workers or not self.writer.is_idle:
                self.alone_since = time.monotonic()
            if self.is_left():
                return
            for channel, until in self.waiting_launches:
                if time.monotonic() > until:
                    self.reply(channel, busy=True)
            self.waiting_launches = [waiting for waiting in self.waiting_launches if time.monotonic() <= waiting[1]]

    def is_left(self) -> bool:
        """Whether nobody is to come any more. Then the newest state has been written."""
        if self.workers:
            return False
        now = time.monotonic()
        if not self.waiting_launches and not self.driver_is_dead() and now - self.alone_since < GRACE_S:
            return False
        if not self.writer.is_idle or now < self.retry_at:
            return False
        try:
            self.flush()
        except (StorageError, CheckpointError) as error:
            return self.has_held_on(str(error), now)
        self.writer.close()
        return True

    def has_held_on(self, why: str, now: float) -> bool:
        """The newest state, which cannot be saved, is kept and tried again; whether that has been so for HOLD_S."""
        if self.held_since is None:
            self.held_since = now
            note(self.run_uri, f"the newest state is held in memory, since it could not be saved: {why}")
        self.retry_at = now + SAVE_AGAIN_S
        slot = self.status.newest()
        for channel, _ in self.waiting_launches:
            self.reply(channel, unsaved=why, step=self.status.progress(slot).step if slot is not None else 0)
        self.waiting_launches = []
        return now - self.held_since > HOLD_S

    def driver_is_dead(self) -> bool:
        driver = self.description.get("driver") or [None]
        return driver[0] == host() and started_at(driver[1]) != driver[2]

    def accept(self) -> None:
        sock, _ = self.listener.accept()
        if is_own(sock):
            self.channels.append(Channel(sock))
        else:
            sock.close()

    def has_more(self, channel: Channel) -> bool:
        """Whether it has something to say, or has ended, and nobody has seen to that yet."""
        return channel in self.channels and channel.poll()

    def answer(self, channel: Channel) -> bool:
        """Does what one message asks for; True if it was the last."""
        try:
            message = channel.receive()
            return bool(getattr(self, f"on_{message.pop('op')}")(channel, **message))
        except (EOFError, OSError):
            self.drop(channel)
            return False

    def drop(self, channel: Channel) -> None:
        self.watchdog.drop(channel)
        self.workers.discard(channel)
        self.waiting_launches = [waiting for waiting in self.waiting_launches if waiting[0] is not channel]
        if channel in self.channels:
            self.channels.remove(channel)
            channel.close()

    def reply(self, channel: Channel, **answer: Any) -> None:
        with self.replying, contextlib.suppress(OSError):  # it has died: then nobody wants to know
            channel.send(**answer)
            self.status.answered()

    def on_hello(self, channel: Channel, launch: str) -> bool:
        """A worker of this launch, or one of another: that has to take over.

        What the dead before it have said comes first: the slots that they want written must not be filled again.
        """
        for other in [other for other in self.channels if other is not channel]:
            while self.has_more(other):
                if self.answer(other):
                    return True
        if launch != self.launch:
            self.reply(channel, other=self.launch)
            return False
        self.workers.add(channel)
        slots = self.slots
        self.reply(
            channel,
            slot_bytes=slots.slot_bytes if slots else 0,
            hangs=[hang.report for hang in self.watchdog.hangs],
        )
        channel.send_descriptor(self.status.descriptor)
        if slots:
            channel.send_descriptor(slots.descriptor)
        return False

    def on_describe(self, channel: Channel, **description: Any) -> None:
        """What is to be known to write a state that nobody asked to be saved: manifest, policy, driver."""
        self.description = description

    def on_slots(self, channel: Channel, slot_bytes: int) -> None:
        """Larger memory, in place of what there was."""
        self.slots = slots = Slots(channel.receive_descriptor(), slot_bytes)
        threading.Thread(target=slots.fetch, args=[lambda: self.slots is slots], daemon=True).start()

    def on_save(self, channel: Channel, slot: int, **request: Any) -> None:
        data, progress = self.state(slot), self.status.progress(slot)
        self.writer.take(WriteRequest(channel, slot=slot, data=data, progress=progress, **request))

    def on_metrics(self, channel: Channel, **request: Any) -> None:
        self.writer.take(WriteRequest(channel, manifest={}, **request))

    def on_watch(self, channel: Channel, **worker: Any) -> None:
        """This worker's heartbeat shall be looked at."""
        self.reply(channel, place=self.watchdog.add(channel, channel.receive_descriptor(), **worker))

    def on_hangs(self, channel: Channel) -> None:
        """Somebody wants to know why a worker has died."""
        self.reply(channel, hangs=[hang.report for hang in self.watchdog.hangs])

    def on_newest(self, channel: Channel) -> None:
        """Somebody wants to know what is held here."""
        slot = self.status.newest()
        self.reply(channel, newest=None if slot is None else dataclasses.astuple(self.status.progress(slot)))

    def on_take_over(self, channel: Channel, timeout_s: float) -> None:
        self.waiting_launches.append((channel, time.monotonic() + timeout_s))
        self.retry_at = 0.0

    def on_end(self, channel: Channel) -> bool:
        """The run is over and saved: nothing in here is needed any more."""
        self.writer.close()
        return True

    def flush(self) -> None:
        """The newest state is in the run's checkpoints, unless those have a newer one, or another launch runs."""
        slot = self.status.newest()
        if self.slots is None or slot is None or not self.description:
            return
        progress = self.status.progress(slot)
        store = self.store()
        if store.storage.is_local and not any(map(store.storage.exists, ("ckpt", JOURNAL))):
            return  # somebody has removed the run
        with locked(store.storage, LOCK_S):
            if any(e.manifest and self.is_overtaken_by(e.manifest, progress) for e in store.listed()):
                return
            self.save(store, self.state(slot), progress, self.description["manifest"])

    def is_overtaken_by(self, manifest: Manifest, progress: Progress) -> bool:
        theirs, own = manifest.progress, (progress.epoch, progress.cursor)
        later = manifest.launch != self.launch and manifest.launch > self.launch  # they begin with the time
        return later or (theirs.epoch, theirs.cursor) >= own

    def store(self) -> Store:
        return Store(open_storage(self.run_uri), SimpleNamespace(**self.description["policy"]), self.launch)

    def state(self, slot: int) -> memoryview:
        assert self.slots is not None, "something was written there"
        return self.slots.view(slot, self.status.size_bytes(slot))

    def save(self, store: Store, data: memoryview, progress: Progress, manifest: dict[str, Any]) -> Manifest:
        return store.save(data, Manifest(progress, **manifest), time.time()).manifest


def main(run_uri: str, launch: str) -> None:
    """Listens, leaves the family of its starter, and keeps."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(address_of(run_uri))
    except OSError:
        return  # there is one already
    listener.listen(64)
    if os.fork():
        os._exit(0)
    listener.listen(64)  # once more: who connects is told the process that has called this
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when there is nothing to keep
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 2)
    with contextlib.suppress(OSError):
        os.nice(5)
    keeper = Keeper(listener, run_uri, launch)
    try:
        keeper.live()
        remove_abandoned()
    except BaseException:
        note(run_uri, traceback.format_exc())
        raise


def note(run_uri: str, text: str) -> None:
    """For whoever looks for what became of the newest state."""
    with contextlib.suppress(Exception):
        storage = open_storage(run_uri)
        storage.write_bytes("logs/keeper.log", f"{time.strftime('%F %T')}\n{text}".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
