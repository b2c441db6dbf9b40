"""What a process puts into TMPDIR, /tmp and /dev/shm, held for as long as it lives: what a killed one has left goes.

Whether the maker of such a folder lives is asked of its lock (flock) on the folder, which the kernel gives back when
the process dies. So it is known in every container that shares the place, also where the process cannot be seen; the
name says on which kernel that is. Semaphores go with the folder that they are named after.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import multiprocessing
import multiprocessing.util
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any, cast

from raytrain.errors import PreflightError
from raytrain.storage.processes import closed_in_forks, kernel

SEMAPHORES = "/dev/shm"  # where Linux has those with a name, as sem.<name>
SHORT = "/tmp"  # for sockets, where TMPDIR is too long
SOCKET_PATH_BYTES = 107  # at most, on Linux
LISTENER_BYTES = len("-12345678/listener-12345678")  # what tempfile and multiprocessing put behind a mark
PREFIX = "raytrain-"
NAME = re.compile(r"raytrain-(?:ray-)?\d+-([0-9a-f]{6})-\w+")  # of folders: process, kernel, random


def kernel_id() -> str:
    return hashlib.sha256(kernel().encode()).hexdigest()[:6]


def own_mark(prefix: str = PREFIX) -> str:
    """What names of this process begin with; its number in them is for people."""
    return f"{prefix}{os.getpid()}-{kernel_id()}"


class FolderLock:
    """A process's lock on a folder, until it ends; OSError if there is no such folder, or another process has it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self.descriptor), path.lstat()):  # another took it away, and made its own
                raise FileNotFoundError(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Also a second time, as in a fork that comes later."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class ScratchFolder:
    """A new folder in TMPDIR, or below that path, until `remove` or the end of this process. Those of the dead go."""

    def __init__(self, below: str | None = None, prefix: str = PREFIX) -> None:
        remove_abandoned()
        self.path, lock = held_folder(below, prefix)
        remove: Any = multiprocessing.util.Finalize  # not atexit: it runs in worker processes too that Ray kills
        self.remove = remove(None, remove_held, args=(self.path, lock), exitpriority=-100)


def held_folder(below: str | None, prefix: str) -> tuple[Path, FolderLock]:
    """A new folder, locked."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{own_mark(prefix)}-", dir=below))
        try:
            lock = FolderLock(path)
        except (FileNotFoundError, BlockingIOError):  # another process has just taken it for abandoned
            continue
        closed_in_forks(lock)
        return path, lock


def remove_held(path: Path, lock: FolderLock) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.close()


def remove_abandoned() -> None:
    """What processes of this user have left on this machine, in this container or another, that are dead by now."""
    for place in {tempfile.gettempdir(), SHORT, SEMAPHORES}:
        with contextlib.suppress(OSError):  # no such folder
            for path in Path(place).iterdir():
                match = NAME.fullmatch(path.name)
                if match is not None and match[1] == kernel_id():
                    remove_if_abandoned(path)


def remove_if_abandoned(path: Path) -> None:
    """Nothing where its maker lives, or is another user."""
    with contextlib.suppress(OSError):  # it is held, a link, or another process has been faster
        if path.lstat().st_uid != os.getuid():
            return
        lock = FolderLock(path)
        for semaphore in path.parent.glob(f"sem.{path.name}-*"):
            semaphore.unlink(missing_ok=True)
        remove_held(path, lock)


@contextlib.contextmanager
def named_by_this_process() -> Iterator[None]:
    """What module multiprocessing makes in the block, and in processes that start there, has this process's name.

    Its sockets lie in a scratch folder, for as long as this process lives, with a path that is short enough.
    """
    if not Path(SEMAPHORES).is_dir():  # not Linux
        yield
        return
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if not is_own_folder(config.get("tempdir")):
        config["tempdir"] = str(socket_scratch().path)
    if not is_own_folder(config.get("semaphores")):
        config["semaphores"] = str(semaphore_scratch().path)
    mark, semaphores = f"/{Path(config['semaphores']).name}", cast("Any", SemLock)
    prefix, config["semprefix"] = config["semprefix"], mark  # which processes that start here take over
    make_name = semaphores._make_name
    # As well, since joblib (scikit-learn) puts a function of its own there, which does not ask for the prefix.
    semaphores._make_name = staticmethod(lambda: f"{mark}-{next(semaphores._rand)}")
    try:
        yield
    finally:
        config["semprefix"], semaphores._make_name = prefix, staticmethod(make_name)


def is_own_folder(path: str | None) -> bool:
    """Whether this very process has made it, and it is there still."""
    return path is not None and Path(path).name.startswith(f"{own_mark()}-") and Path(path).is_dir()


def semaphore_scratch() -> ScratchFolder:
    """The folder that stands for this process among the semaphores."""
    try:
        return ScratchFolder(SEMAPHORES)
    except OSError as error:
        raise PreflightError(
            f"{SEMAPHORES} cannot be written to ({error.strerror}), where loader workers have what they share. Make it "
            "writable (docker: --tmpfs /dev/shm:rw,size=8g), or load in the training process (--workers 0)"
        ) from error


def socket_scratch() -> ScratchFolder:
    """A scratch folder whose sockets have a path that is short enough: in TMPDIR if that allows it."""
    most_bytes = SOCKET_PATH_BYTES - LISTENER_BYTES - len(own_mark()) - 1
    temp_dir = tempfile.gettempdir()
    fits = len(os.fsencode(temp_dir)) <= most_bytes
    try:
        return ScratchFolder(temp_dir if fits else SHORT)
    except OSError as error:
        if fits:
            raise
        raise PreflightError(
            f"TMPDIR is {temp_dir}, which is too long for the sockets of loader workers, and {SHORT} cannot be written "
            f"to ({error.strerror}). Set TMPDIR to a folder whose path has {most_bytes} characters at most, or load in "
            "the training process (--workers 0)"
        ) from error
