"""One run a folder: the lock that its writer holds, and what it never writes through."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from raytrain.errors import PreflightError
from raytrain.storage.processes import closed_in_forks
from raytrain.storage.retry import as_storage_error
from raytrain.storage.storage import Storage

LOCK = ".lock"
JOURNAL = "journal.jsonl"
TELL_AFTER_S = 1.0  # one that is just dying is gone by then


def refuse_links(storage: Storage, continued: str = JOURNAL) -> None:
    """PreflightError if a file that a run appends to is a link: in a folder from elsewhere it could name any file.

    continued: as in RunFolder.   Files that are written whole take a link's place.
    """
    if not storage.is_local:
        return
    for name in (LOCK, continued, *(f"logs/{log}" for log in storage.list("logs"))):
        path = storage.local_path(name)
        if path.is_symlink():
            raise PreflightError(
                f"{path}: this is a link to {path.readlink()}, and would be written through. Remove it, or give the "
                "run a folder of its own (--extra_tag NAME)"
            )


@contextlib.contextmanager
def locked(
    storage: Storage, timeout_s: float = 30.0, tell: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Only one process at a time writes in this run folder; one that is just dying is waited for.

    Local and NFS folders only: object stores have no locks.
    tell: is given a line on what is waited for, where that takes a while
    """
    if not storage.is_local:
        yield
        return
    with contextlib.ExitStack() as stack:
        with as_storage_error("lock this run folder", storage.path_of(LOCK)):
            # Without a buffer: a process that is forked while another thread writes would wait for that in `close`.
            file = stack.enter_context(open(storage.local_path(LOCK), "a+b", buffering=0))
            closed_in_forks(file)
            _wait_for_lock(file, storage.path_of(""), timeout_s, tell)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode())
        yield


def _wait_for_lock(file: Any, folder: str, timeout_s: float, tell: Callable[[str], None]) -> None:
    began, is_told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited_s = time.monotonic() - began
            file.seek(0)
            found = f"{folder}: another run is training in this folder ({file.read().decode() or 'holder unknown'})"
            if waited_s >= timeout_s:
                raise PreflightError(
                    f"{found}. Wait for it or end it, or give this one a folder of its own (--extra_tag NAME)"
                ) from None
            if waited_s >= TELL_AFTER_S and not is_told:
                tell(f"{found}; its end is waited for, {timeout_s:.0f} s at most")
                is_told = True
            time.sleep(0.1)
        except OSError:
            return None  # a file system without locks
