"""Other processes of this host, as /proc tells of them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DUMP = getattr(signal, "SIGRTMIN", 0) + 3  # makes a worker write its stacks; SIGUSR1 and 2 are the user's, and Slurm's


def closed_in_forks(file: Any) -> None:
    """A process that the user's code forks does not hold on to `file`: it may live on when this one is killed.

    `file.close()` takes no lock: other threads of this process may hold it, which the fork has not.
    """
    living = weakref.ref(file)

    def close() -> None:
        if (kept := living()) is not None:
            kept.close()

    os.register_at_fork(after_in_child=close)


def kernel() -> str:
    """Tells machines, and their boots, apart; the containers of one share it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def host() -> str:
    """Tells machines, and containers that do not see each other's processes, apart."""
    namespace = Path("/proc/self/ns/pid")
    return f"{kernel()} {namespace.readlink()}" if namespace.is_symlink() else kernel()


def started_at(pid: int) -> str | None:
    """When that process was started (in clock ticks since boot); None if it is dead, or only not yet buried."""
    state, *fields = stat_of(pid)
    return None if state in "ZX" else fields[18]  # field 22 of proc(5)


def is_stopped(pid: int) -> bool:
    """By a signal, or a debugger."""
    return stat_of(pid)[0] in "Tt"


def parent_of(pid: int) -> int:
    """0 if there is no such process, or none above it."""
    _, *fields = stat_of(pid)
    return int(fields[0]) if fields else 0


def is_of_torchrun(pid: int) -> bool:
    """Whether torchrun has started that process, or one above it."""
    try:
        return b"\0TORCHELASTIC_RUN_ID=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or there is no /proc
        return False


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, which is X if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"]


def children_of(pid: int) -> list[int]:
    """The processes that this one has started and that are left."""
    others = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [other for other in others if stat_of(other)[1:2] == [str(pid)]]


def descendants_of(pid: int) -> Iterator[int]:
    """The processes that this one has started, and those that these have."""
    for child in children_of(pid):
        yield child
        yield from descendants_of(child)


def command_of(pid: int) -> str:
    """What a process calls itself; nothing if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0 ")
    return ""


def commands() -> Iterator[list[str]]:
    """The words of every process of this host."""
    for folder in Path("/proc").glob("[0-9]*"):
        if command := command_of(int(folder.name)):
            yield command.split("\0")


def status_of(pid: int, name: str) -> str:
    """That line of /proc/PID/status; nothing if the process is gone."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        return found[1] if found else ""
    return ""


def wait_channel_of(pid: int) -> str:
    """Where in the kernel a process waits; nothing if that says nothing."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/wchan").read_text().strip("0")
    return ""


def path_of_descriptor(pid: int, descriptor: int) -> str:
    """By which others of this host open the file that a process has open."""
    return f"/proc/{pid}/fd/{descriptor}"


def write_stacks_to(path: str) -> None:
    """From now on DUMP makes this process do so, in C: also while a call that never returns holds the interpreter."""
    with contextlib.suppress(OSError):  # then there is no stack to show
        faulthandler.register(DUMP, file=open(path, "ab", buffering=0), all_threads=True)  # noqa: SIM115
