"""Memory that all processes of a host have mapped, and the order in which they see each other's writes to it."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytrain.engine.world import World


def why_not_mapped(world: World) -> str | None:
    """Collective. What keeps the processes from sharing memory, the same on each; None if nothing does."""
    if world.device.type != "cpu":
        return f"gradients are on the {world.device.type} device"
    reason = None
    if not hasattr(os, "memfd_create"):
        reason = "this system has no memfd_create"
    elif memory_fence() is None:
        reason = f"{platform.machine()} needs a memory fence and libatomic.so.1 is not here"
    offer = None
    if world.is_first and reason is None:
        token = secrets.token_bytes(16)
        with open(os.memfd_create("raytrain-probe"), "w+b") as file:
            file.write(token)
            file.flush()
            offer = world.broadcast_object((os.getpid(), file.fileno(), token))
            seen = world.all_objects(True)
    else:
        offer = world.broadcast_object(None)
        seen = world.all_objects(reason is None and offer is not None and sees(*offer))
    if all(seen):
        return None
    return reason or "the workers are not all on one host, or may not look into each other's /proc"


def sees(pid: int, descriptor: int, token: bytes) -> bool:
    try:
        return Path(f"/proc/{pid}/fd/{descriptor}").read_bytes() == token
    except OSError:
        return False


def mapped_by_all(world: World, size_bytes: int) -> mmap.mmap:
    """Collective. Zeroed memory that all processes of this host have mapped."""
    if world.is_first:
        descriptor = os.memfd_create("raytrain-reduction")
        os.ftruncate(descriptor, size_bytes)
        world.broadcast_object((os.getpid(), descriptor))
    else:
        pid, theirs = world.broadcast_object(None)
        descriptor = os.open(f"/proc/{pid}/fd/{theirs}", os.O_RDWR)
    memory = mmap.mmap(descriptor, size_bytes)
    world.all_objects(None)  # rank 0 keeps its descriptor until everyone has opened it
    os.close(descriptor)
    return memory


def memory_fence() -> Callable[[], None] | None:
    """What keeps stores before it before stores after it, loads likewise; None where there is none.

    x86 orders both by itself. Elsewhere C11's fence, which every Linux has in libatomic.
    """
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        return lambda: None
    return libatomic_fence()


def libatomic_fence() -> Callable[[], None] | None:
    sequentially_consistent = 5
    try:
        fence: Any = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    return lambda: fence(sequentially_consistent)


def num_cpus() -> int:
    """The cores that this process may use: its affinity, and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):
        return allowed
