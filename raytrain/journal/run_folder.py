"""The run folder on this machine: its files, its sinks, and the lock that keeps two writers apart."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytrain import __version__
from raytrain.errors import PreflightError, masked
from raytrain.journal.journal import JsonlSink, LogSink, TensorBoardSink
from raytrain.journal.records import Record, log_file_name
from raytrain.keeper.shared_memory import closed_in_forks
from raytrain.storage.retry import explained
from raytrain.storage.storage import LocalStorage, Storage, open_storage

LOCK = ".lock"
JOURNAL = "journal.jsonl"


class RunFolder:
    """Where a run writes. Behind a URI the growing files (journal, log, curves) live in a spool here
    and are copied there after each checkpoint, evaluation and end: object stores cannot append.

    continued: the file that a later writer appends to, a run's journal or a sweep's ledger
    """

    def __init__(self, uri: str, continued: str = JOURNAL) -> None:
        self.storage: Storage = open_storage(uri)
        self._continued = continued
        self._spool: Path | None = None
        self._copied: dict[str, tuple[int, int]] = {}

    @property
    def local(self) -> Path:
        """The folder on this machine that growing files are written to. Rank 0 only: two spools would overwrite
        each other's files behind the URI."""
        if self.storage.is_local:
            return self.storage.local_path("")
        if self._spool is None:
            self._spool = Path(tempfile.mkdtemp(prefix="raytrain-spool-"))
            if self.storage.exists(self._continued):
                self.storage.download(self._continued, self._spool / self._continued)
        return self._spool

    @property
    def here(self) -> LocalStorage:
        """`local`, for files that the journal tells of: sinks read them there, and `publish` copies them."""
        return LocalStorage(self.local)

    def publish(self) -> None:
        """Copy what has grown since the last time, where that is needed."""
        if self._spool is None:
            return
        for path in sorted(p for p in self._spool.rglob("*") if p.is_file()):
            name, stat = path.relative_to(self._spool).as_posix(), path.stat()
            if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
                self.storage.upload(path, name)
                self._copied[name] = (stat.st_size, stat.st_mtime_ns)

    def close(self) -> None:
        """Publish the rest and remove the spool."""
        if self._spool is not None:
            try:
                self.publish()
            finally:
                shutil.rmtree(self._spool, ignore_errors=True)

    def log_sink(self, now: float) -> LogSink:
        return LogSink(self.local / log_file_name(now))

    def sinks(self) -> list[Any]:
        """The journal's and tensorboard's."""
        return [JsonlSink(self.local / JOURNAL), TensorBoardSink(self.local / "tensorboard"), _Publisher(self.publish)]

    def describe(self, config_yaml: str, arguments: dict[str, Any]) -> None:
        """Write config.yaml and environment.json."""
        self.storage.write_bytes("config.yaml", config_yaml.encode())
        self.storage.write_bytes("environment.json", json.dumps(environment(arguments), indent=1).encode() + b"\n")

    def locked(self, patience_s: float = 30.0) -> contextlib.AbstractContextManager[None]:
        """See the function `locked`."""
        return locked(self.storage, patience_s)


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
def locked(storage: Storage, patience_s: float = 30.0) -> Iterator[None]:
    """Only one process at a time writes in this run folder; one that is just dying is waited for.

    Local and NFS folders only: object stores have no locks.
    """
    if not storage.is_local:
        yield
        return
    with contextlib.ExitStack() as stack:
        with explained("lock this run folder", storage.path_of(LOCK)):
            file = stack.enter_context(open(storage.local_path(LOCK), "a+"))
            closed_in_forks(file)
            _wait_for_lock(file, storage.path_of(""), patience_s)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
            file.flush()
        yield


def _wait_for_lock(file: Any, folder: str, patience_s: float) -> None:
    give_up = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= give_up:
                file.seek(0)
                raise PreflightError(
                    f"{folder}: another run is training in this folder ({file.read() or 'holder unknown'}). "
                    "Wait for it or end it, or give this one a folder of its own (--extra_tag NAME)"
                ) from None
            time.sleep(0.1)
        except OSError:
            return None  # a file system without locks


class _Publisher:
    """A sink that copies the run folder's growing files after the records that matter."""

    def __init__(self, publish: Callable[[], None]) -> None:
        self._publish = publish
        self._due = False

    def write(self, record: Record) -> None:
        self._due = self._due or record["kind"] != "step"

    def flush(self) -> None:
        if self._due:
            self._due = False
            self._publish()

    def close(self) -> None:
        self.flush()


def environment(arguments: dict[str, Any]) -> dict[str, Any]:
    """Versions, hardware and command line, for whoever asks later what made these weights."""
    import numpy
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "raytrain": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "ray": getattr(sys.modules.get("ray"), "__version__", None),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "git": _git_commit(),
        "arguments": {k: masked(str(v)) for k, v in arguments.items()},
        "argv": [masked(word) for word in sys.argv],
    }


def _git_commit() -> str | None:
    """The commit of the current folder's repository, read from its files."""
    for folder in (Path.cwd(), *Path.cwd().parents):
        head = folder / ".git" / "HEAD"
        if head.is_file():
            text = head.read_text().strip()
            if not text.startswith("ref: "):
                return text
            ref, packed = folder / ".git" / text[5:], folder / ".git" / "packed-refs"  # the latter after `git gc`
            if ref.is_file():
                return ref.read_text().strip()
            lines = packed.read_text().splitlines() if packed.is_file() else []
            return next((line.split()[0] for line in lines if line.endswith(f" {text[5:]}")), None)
    return None
