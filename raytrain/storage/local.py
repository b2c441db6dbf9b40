"""A run folder on a disk of this machine, or one that is mounted (NFS, FUSE)."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raytrain.storage.direct_io import file_equals, open_direct, write_all
from raytrain.storage.paths import Bytes, Parts, expanded, folder_of, parts_of, temporary_name
from raytrain.storage.retry import RETRY_S, as_storage_error, retrying


class LocalStorage:
    """A folder on a disk of this machine, or one that is mounted (NFS, FUSE)."""

    is_local = True

    def __init__(self, root: Path, retry_s: float = RETRY_S) -> None:
        self.root = expanded(root).absolute()
        self.retry_s = retry_s

    def path_of(self, name: str) -> str:
        return str(self.local_path(name))

    def local_path(self, name: str) -> Path:
        return self.root / name if name else self.root

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self.local_path(name)

    @retrying("look at")
    def exists(self, name: str) -> bool:
        try:
            self.local_path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @retrying("list")
    def list(self, name: str) -> list[str]:
        try:
            return sorted(child.name for child in self.local_path(name).iterdir())
        except FileNotFoundError:
            return []

    @retrying("look at")
    def size(self, name: str) -> int:
        return self.local_path(name).stat().st_size

    @retrying("make the folder")
    def makedirs(self, name: str) -> None:
        path = self.local_path(name)
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync_folder(folder.parent)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        with self._opened(name) as file, as_storage_error("read", self.path_of(name)):
            yield file

    @retrying("read")
    def read_bytes(self, name: str) -> bytes:
        return self.local_path(name).read_bytes()

    def write_bytes(self, name: str, data: Bytes) -> None:
        self.write_parts(name, lambda: [memoryview(data)])

    @retrying("read")
    def same_bytes(self, name: str, data: Bytes) -> bool:
        with open_direct(self.local_path(name), os.O_RDONLY) as handle:
            return file_equals(handle, memoryview(data))

    def upload(self, local_file: Path, name: str) -> None:
        LocalStorage(local_file.parent).download(local_file.name, self.local_path(name))

    def download(self, name: str, local_file: Path) -> None:
        with self._opened(name) as source:
            LocalStorage(local_file.parent).write_parts(local_file.name, lambda: parts_of(source))

    @retrying("write")
    def write_parts(self, name: str, parts: Parts) -> None:
        """As write_bytes, of several parts."""
        path, beside = self.local_path(name), self.local_path(temporary_name("writing", name))
        self.makedirs(folder_of(name))
        try:
            with open_direct(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle:
                for part in parts():
                    write_all(handle, memoryview(part))
                os.fsync(handle)
            beside.replace(path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the failure above is the one to tell
                beside.unlink(missing_ok=True)
            raise

    def rename_tree(self, source: str, target: str) -> None:
        self.makedirs(folder_of(target))
        self._rename(source, target)

    @retrying("rename")
    def _rename(self, source: str, target: str) -> None:
        old, new = self.local_path(source), self.local_path(target)
        if old.exists() or not new.exists():
            if old.is_dir():
                _sync_folder(old)  # its entries reach the disk before the name that vouches for them
            old.rename(new)
        for folder in {old.parent, new.parent}:
            _sync_folder(folder)

    @retrying("delete")
    def remove_tree(self, name: str) -> None:
        path = self.local_path(name)
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            return
        _sync_folder(path.parent)

    @retrying("read")
    def _opened(self, name: str) -> IO[bytes]:
        return self.local_path(name).open("rb")


def _sync_folder(path: Path) -> None:
    """The names in folder `path` are on the disk; without it a rename can be lost with the power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)
