"""How workers and commands find the keeper of a run folder, start it, and talk to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import raytrain
from raytrain.errors import PreflightError
from raytrain.keeper.channel import ANSWER_S, Channel, is_own
from raytrain.keeper.shared_memory import Slots, StatusTable
from raytrain.progress import Progress
from raytrain.storage.processes import host

if TYPE_CHECKING:
    from raytrain.engine.world import World

START_S = 60.0
LOOK_S = 0.02
END_S = 2.0  # so long a keeper that has saved its state takes to be gone; one that begins and ends so long has failed
SAVE_S = 900.0  # so long a keeper that ends may take to save what it holds
WITHOUT = "no memory beside this process for the run's state, so training waits for each checkpoint to be written"
TAKE_OVER_S = 35.0  # so long the workers of an earlier launch may take to die


def is_possible() -> bool:
    """Whether this system has what a keeper needs: Linux does."""
    return hasattr(os, "memfd_create") and sys.platform == "linux"


def address_of(run_uri: str) -> str:
    """Where the keeper of a run folder listens on this host, by whichever links the folder is named.

    Containers that share the network have the same addresses, but not the same paths, and do not see each other's
    processes: each has keepers of its own.
    """
    place = run_uri if "://" in run_uri else os.path.realpath(run_uri)
    return f"\0raytrain-{os.getuid()}-{hashlib.sha256(os.fsencode(f'{host()} {place}')).hexdigest()[:24]}"


def connect(run_uri: str) -> Channel | None:
    """A channel to this run folder's keeper on this host; None if there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(address_of(run_uri))
    except OSError:
        sock.close()
        return None
    if not is_own(sock):
        sock.close()
        return None
    return Channel(sock)


def connect_or_start(run_uri: str, launch: str) -> Channel:
    """A channel to the keeper of this run folder, which is started if there is none."""
    channel = connect(run_uri)
    if channel is None:
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
                _, errors = process.communicate(timeout=START_S)
            except subprocess.TimeoutExpired:  # else leaving this block would wait for it without end
                process.kill()
                errors = f"it took more than {START_S:g} s".encode()
        channel = connect(run_uri)
        if channel is None:
            raise OSError(f"the keeper of {run_uri} did not start: {errors.decode(errors='replace').strip()[-2000:]}")
    return channel


def query(run_uri: str, op: str) -> dict[str, Any]:
    """What the keeper of this run folder on this host answers; empty if there is none, or it takes too long."""
    channel = connect(run_uri) if is_possible() else None
    if channel is None:
        return {}
    with contextlib.closing(channel), contextlib.suppress(EOFError, OSError):
        channel.send(op=op)
        if channel.poll(ANSWER_S):
            return channel.receive()
    return {}


def newest_progress(run_uri: str) -> Progress | None:
    """Where the newest state stands that is in memory on this host for this run folder; None if there is none."""
    newest = query(run_uri, "newest").get("newest")
    return Progress(*newest) if newest else None


def take_over(run_uri: str, timeout_s: float) -> None:
    """Nobody keeps this run folder on this host any more: the newest state that was kept is in its checkpoints.

    Returns without that if workers still train there after timeout_s. PreflightError if the keeper does not reply,
    or cannot save it.
    """
    channel = connect(run_uri) if is_possible() else None
    if channel is None:
        return
    try:
        channel.send(op="take_over", timeout_s=timeout_s)
        reply = channel.receive_within(timeout_s + SAVE_S)  # that workers train there, or the end
        if "unsaved" in reply:
            raise PreflightError(
                f"{run_uri}: the state after step {reply['step']} stands in the memory of process {channel.peer} only, "
                f"which could not save it: {reply['unsaved']}\n"
                f"It tries again every few seconds and at the next launch. "
                f"`kill -9 {channel.peer}` gives up what is in no checkpoint"
            )
    except (EOFError, OSError):
        return
    finally:
        channel.close()


class KeeperClient:
    """This process's side of the keeper of its host.

    leads: whether it is the first of its host;  keeps: whether it copies states to the keeper's memory
    hangs: why workers before this one were killed (watchdog.Hang.report)
    """

    def __init__(self, run_uri: str, launch: str, leads: bool = True, keeps: bool = True) -> None:
        """Joins the keeper of this launch, or starts it; one that another launch has left writes its state first."""
        self._run_uri, self._launch, self.leads, self.keeps = run_uri, launch, leads, keeps
        self.join()

    def join(self) -> None:
        """At first, and again after a keeper that has died."""
        greeting = self._greet()
        if "other" in greeting:
            take_over(self._run_uri, TAKE_OVER_S)
            greeting = self._greet()
        if "other" in greeting:
            raise PreflightError(
                f"{self._run_uri}: another run is training in this folder on this host. Wait for it or end it, "
                "or give this one a folder of its own (--extra_tag NAME)"
            )
        self.hangs: list[dict[str, Any]] = greeting["hangs"]
        self.status = StatusTable(self.channel.receive_descriptor())
        self.slots = (
            Slots(self.channel.receive_descriptor(), greeting["slot_bytes"]) if greeting["slot_bytes"] else None
        )

    def _greet(self) -> dict[str, Any]:
        """What the keeper says to this launch; one that is just ending has saved its state, and another begins."""
        give_up = time.monotonic() + END_S
        while True:
            self.channel = connect_or_start(self._run_uri, self._launch)
            try:
                self.channel.send(op="hello", launch=self._launch)
                greeting = self.channel.receive_within(START_S)
            except (EOFError, ConnectionError):
                self.channel.close()
                if time.monotonic() > give_up:
                    raise
                time.sleep(LOOK_S)
                continue
            if "other" in greeting:
                self.channel.close()
            return greeting

    @property
    def newest(self) -> Progress | None:
        """Of the newest state that is kept on this host."""
        slot = self.status.newest()
        return None if slot is None or self.slots is None else self.status.progress(slot)

    def state(self, slot: int) -> memoryview:
        """The checkpoint.pth in a slot."""
        assert self.slots is not None, "something was written there"
        return self.slots.view(slot, self.status.size_bytes(slot))

    def end(self) -> None:
        """The run is over, and all of it is saved: the keeper ends, and this returns when it has."""
        with contextlib.suppress(EOFError, OSError):
            self.channel.send(op="end")
            self.channel.receive_within(SAVE_S)

    def close(self) -> None:
        self.channel.close()


def start_keeper(run_uri: str, launch: str) -> threading.Thread:
    """Has a keeper started on this host; what is done until this ends does not wait for that."""

    def start() -> None:
        with contextlib.suppress(OSError):  # join_keeper tells, if that fails too
            connect_or_start(run_uri, launch).close()

    thread = threading.Thread(target=start, name="raytrain-keeper", daemon=True)
    thread.start()
    return thread


def join_keeper(run_uri: str, launch: str, world: World) -> tuple[KeeperClient | None, list[str]]:
    """Collective. This process's side of its host's keeper, and what a user should know.

    None where the system has no such memory, or gives none. States are copied by rank 0, and by the first rank of one
    other host: that has the same state, so nothing travels.
    """
    hosts = world.all_objects(host() if is_possible() else None)
    if None in hosts:
        return None, []
    first_ranks = [hosts.index(host) for host in hosts]
    leads = first_ranks[world.rank] == world.rank
    keeper, refusal = None, ""
    if leads:
        try:
            keeper = KeeperClient(run_uri, launch, leads, world.rank in sorted(set(first_ranks))[:2])
        except (OSError, EOFError) as error:
            refusal = str(error) or "its process ended"
    answers = world.all_objects((refusal, keeper.hangs if keeper else []))  # from here on each host's keeper stands
    refusals = [refusal for refusal, _ in answers if refusal]
    if refusals:
        if keeper is not None:
            keeper.end()
        return None, [f"{WITHOUT}: {refusals[0]}"]
    keeper = keeper or KeeperClient(run_uri, launch, leads=False, keeps=False)
    keeper.hangs = [hang for _, hangs in answers for hang in hangs]
    return keeper, []
