"""What a process puts into TMPDIR and /dev/shm, under its own name: what a killed one has left is known, and removed.

Folders and semaphores are called `raytrain-<system>-<pid>.<start of that process>-<random>`. The system is this boot
and this container: of processes of another one nobody here knows whether they live.
"""

from __future__ import annotations

import contextlib
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
from raytrain.storage.processes import host, started_at

SEMAPHORES = "/dev/shm"  # where Linux has those with a name, as sem.<name>
SHORT = "/tmp"  # for sockets, where TMPDIR is too long
SOCKET_PATH_BYTES = 107  # at most, on Linux
LISTENER_BYTES = len("-12345678/listener-12345678")  # what tempfile and multiprocessing put behind a mark
NAME = re.compile(r"(?:sem\.)?raytrain-([0-9a-f]{8})-(\d+)\.(\d+)-\w+")


def system_id() -> str:
    return hashlib.sha256(host().encode()).hexdigest()[:8]


def own_mark() -> str:
    """What names of this process begin with."""
    pid = os.getpid()
    return f"raytrain-{system_id()}-{pid}.{started_at(pid) or 0}"


class ScratchFolder:
    """A new folder in TMPDIR, or below that path, until `remove` or the end of this process. Those of the dead go."""

    def __init__(self, below: str | None = None) -> None:
        remove_abandoned()
        self.path = Path(tempfile.mkdtemp(prefix=f"{own_mark()}-", dir=below))
        remove: Any = multiprocessing.util.Finalize  # not atexit: it runs in worker processes too that Ray kills
        self.remove = remove(None, shutil.rmtree, args=(self.path, True), exitpriority=-100)


def remove_abandoned() -> None:
    """What processes of this user and this system have left that are dead by now."""
    for place in {tempfile.gettempdir(), SHORT, SEMAPHORES}:
        with contextlib.suppress(OSError):  # no such folder
            for path in Path(place).iterdir():
                if is_abandoned(path.name):
                    remove_own(path)


def is_abandoned(name: str) -> bool:
    """Whether this is the name of something whose maker is dead."""
    match = NAME.fullmatch(name)
    return match is not None and match[1] == system_id() and started_at(int(match[2])) != match[3]


def remove_own(path: Path) -> None:
    """Nothing where another user has taken such a name."""
    with contextlib.suppress(OSError):  # another process has been faster
        if path.lstat().st_uid != os.getuid():
            return
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextlib.contextmanager
def named_by_this_process() -> Iterator[None]:
    """What module multiprocessing makes in the block, and in processes that start there, has this process's name.

    Its sockets lie in a scratch folder, for as long as this process lives, with a path that is short enough.
    """
    if not Path(SEMAPHORES).is_dir():  # not Linux
        yield
        return
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    socket_folder = Path(config.get("tempdir") or "")
    if not (socket_folder.name.startswith(own_mark()) and socket_folder.is_dir()):
        config["tempdir"] = str(socket_scratch().path)
    mark, semaphores = f"/{own_mark()}", cast("Any", SemLock)
    prefix, config["semprefix"] = config["semprefix"], mark  # which processes that start here take over
    make_name = semaphores._make_name
    # As well, since joblib (scikit-learn) puts a function of its own there, which does not ask for the prefix.
    semaphores._make_name = staticmethod(lambda: f"{mark}-{next(semaphores._rand)}")
    try:
        yield
    finally:
        config["semprefix"], semaphores._make_name = prefix, staticmethod(make_name)


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
