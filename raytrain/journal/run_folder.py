"""The run folder on this machine: its files, its sinks, and the lock that keeps two writers apart."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raytrain import __version__
from raytrain.config.sections import Config, stays_below
from raytrain.errors import ConfigError, masked
from raytrain.hash_seed import hash_seed
from raytrain.journal.heritage_log import log_file_name
from raytrain.journal.records import Record
from raytrain.journal.sinks import JsonlSink, LogSink, TensorBoardSink
from raytrain.storage.local import LocalStorage
from raytrain.storage.lock import JOURNAL, locked
from raytrain.storage.paths import expanded, joined
from raytrain.storage.scratch import ScratchFolder
from raytrain.storage.storage import Storage, open_storage

PROBE = ".writable"


class RunFolder:
    """Where a run writes. Behind a URI the growing files (journal, log, curves) live in a spool here
    and are copied there after each checkpoint, evaluation and end: object stores cannot append.

    continued: the file that a later writer appends to, a run's journal or a sweep's ledger
    """

    def __init__(self, uri: str, continued: str = JOURNAL) -> None:
        self.storage: Storage = open_storage(uri)
        self._continued = continued
        self._spool: ScratchFolder | None = None
        self._copied: dict[str, tuple[int, int]] = {}

    @property
    def local(self) -> Path:
        """The folder on this machine that growing files are written to. Rank 0 only: two spools would overwrite
        each other's files behind the URI."""
        if self.storage.is_local:
            return self.storage.local_path("")
        if self._spool is None:
            self._spool = ScratchFolder()
            if self.storage.exists(self._continued):
                self.storage.download(self._continued, self._spool.path / self._continued)
        return self._spool.path

    @property
    def here(self) -> LocalStorage:
        """`local`, for files that the journal tells of: sinks read them there, and `publish` copies them."""
        return LocalStorage(self.local)

    def publish(self) -> None:
        """Copy what has grown since the last time, where that is needed."""
        if self._spool is None:
            return
        for path in sorted(p for p in self._spool.path.rglob("*") if p.is_file()):
            name, stat = path.relative_to(self._spool.path).as_posix(), path.stat()
            if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
                self.storage.upload(path, name)
                self._copied[name] = (stat.st_size, stat.st_mtime_ns)

    def close(self) -> None:
        """Publish the rest and remove the spool."""
        if self._spool is not None:
            try:
                self.publish()
            finally:
                self._spool.remove()

    def log_sink(self, now: float) -> LogSink:
        return LogSink(self.local / log_file_name(now))

    def sinks(self) -> list[Any]:
        """The journal's and tensorboard's."""
        return [JsonlSink(self.local / JOURNAL), TensorBoardSink(self.local / "tensorboard"), _Publisher(self.publish)]

    def describe(self, config_yaml: str, arguments: dict[str, Any]) -> None:
        """Write config.yaml and environment.json."""
        self.storage.write_bytes("config.yaml", config_yaml.encode())
        self.storage.write_bytes("environment.json", json.dumps(environment(arguments), indent=1).encode() + b"\n")

    def locked(self, *args: Any, **options: Any) -> contextlib.AbstractContextManager[None]:
        """See the function `locked`."""
        return locked(self.storage, *args, **options)


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
        "hash_seed": hash_seed(),
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
            ref, packed_refs = folder / ".git" / text[5:], folder / ".git" / "packed-refs"  # the latter after `git gc`
            if ref.is_file():
                return ref.read_text().strip()
            lines = packed_refs.read_text().splitlines() if packed_refs.is_file() else []
            return next((line.split()[0] for line in lines if line.endswith(f" {text[5:]}")), None)
    return None


def check_writable(storage: Storage, folder: str = "ckpt") -> None:
    """A StorageError says what is wrong with the disk, the bucket, the credentials, the network: now, not at the
    first checkpoint."""
    storage.list("")  # the one request to which S3 says whether it is the key or its secret that is wrong
    storage.makedirs(folder)
    probe = f"{folder}/{PROBE}" if folder else PROBE
    storage.write_bytes(probe, b"")
    storage.remove_tree(probe)


def run_dir_of(cfg: Config) -> str:
    """OUTPUT/EXP_GROUP_PATH/TAG/EXTRA_TAG: an absolute path, or a URI."""
    parts = [part for part in (cfg.EXP_GROUP_PATH, cfg.TAG, cfg.EXTRA_TAG) if part]
    local = "://" not in cfg.OUTPUT or cfg.OUTPUT.lower().startswith("file://")
    expanded(cfg.OUTPUT, "OUTPUT")
    for part in parts:
        if not stays_below(part) or (not local and set("?#%") & set(part)):  # in a URI these end or encode a path
            raise ConfigError(
                f"{part!r} as a part of the run folder would leave OUTPUT; TAG, EXTRA_TAG and "
                "EXP_GROUP_PATH are plain names"
            )
    return joined(open_storage(cfg.OUTPUT).path_of("") if local else cfg.OUTPUT, *parts)
