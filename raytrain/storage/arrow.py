"""A run folder behind a URI, such as s3://bucket/runs, by pyarrow."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from raytrain.errors import ConfigError, StorageError
from raytrain.storage.direct_io import equal_bytes
from raytrain.storage.local import LocalStorage
from raytrain.storage.paths import CHUNK_BYTES, READ_BYTES, Bytes, Parts, folder_of, joined, parts_of
from raytrain.storage.retry import RETRY_S, retrying, with_retries
from raytrain.storage.scratch import ScratchFolder

UPLOAD_BYTES = 64 << 20  # so much of a file is on its way to an object store, in several parts at once
REQUEST_TRIES, REQUEST_S = 2, 3  # by pyarrow itself; its defaults are 31 tries, 99 s of a server that hangs


def filesystem_of(uri: str) -> tuple[Any, str]:
    """pyarrow's file system for `uri`, and the path in it. It tries a request a few times: what is beyond is ours."""
    from pyarrow import ArrowException
    from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem

    try:
        filesystem, root = FileSystem.from_uri(uri)
    except (ValueError, ArrowException) as error:
        raise ConfigError(
            f"{uri}: pyarrow cannot open this: {str(error).splitlines()[0]}. "
            "Use a local path or a URI such as s3://bucket/folder"
        ) from error
    if filesystem.type_name in ("s3", "gcs") and not root.strip("/"):
        raise ConfigError(f"{uri}: this names no bucket. Write it as s3://bucket/folder")
    own: dict[str, Any] = {}
    if filesystem.type_name == "s3":  # a small file in one request instead of three; failures come with close
        own = {"retry_strategy": AwsStandardS3RetryStrategy(max_attempts=REQUEST_TRIES), "allow_delayed_open": True}
    elif filesystem.type_name == "gcs":
        own = {"retry_time_limit": datetime.timedelta(seconds=REQUEST_S)}
    if own:  # no URI can say these: the file system is made anew, from what pickling tells of it
        _, (options,) = filesystem.__reduce__()
        filesystem = type(filesystem)(**{**options, **own})
    return filesystem, root


class ArrowStorage:
    """A folder of a pyarrow file system. Puts are whole; renames are copies followed by deletes."""

    is_local = False

    def __init__(self, filesystem: Any, root: str, uri: str, retry_s: float = RETRY_S) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.uri = uri
        self.retry_s = retry_s

    def path_of(self, name: str) -> str:
        return joined(self.uri, name) if name else joined(self.uri)

    def local_path(self, name: str) -> Path:
        raise StorageError(f"{self.path_of(name)} is not on a disk of this machine; use read_bytes or download")

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        scratch = ScratchFolder()
        try:
            copy = scratch.path / name.rpartition("/")[2]
            self.download(name, copy)
            yield copy
        finally:
            scratch.remove()

    @retrying("look at")
    def exists(self, name: str) -> bool:
        return self._found(self._info(name))

    @retrying("list")
    def list(self, name: str) -> list[str]:
        from pyarrow.fs import FileSelector

        children = self.filesystem.get_file_info(FileSelector(self._key(name), allow_not_found=True))
        return sorted(child.base_name for child in children)

    @retrying("look at")
    def size(self, name: str) -> int:
        info = self._info(name)
        if not info.is_file:
            raise StorageError(f"{self.path_of(name)}: cannot look at: there is no such file")
        return int(info.size)

    @retrying("make the folder")
    def makedirs(self, name: str) -> None:
        self.filesystem.create_dir(self._key(name), recursive=True)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        tried = functools.partial(with_retries, "read", self.path_of(name), retry_s=self.retry_s)
        with self._opened(name) as file, io.BufferedReader(_Reader(file, tried), READ_BYTES) as stream:
            yield stream

    def read_bytes(self, name: str) -> bytes:
        with self.open_read(name) as file:
            return file.read()

    def write_bytes(self, name: str, data: Bytes) -> None:
        view = memoryview(data)
        self._put(name, lambda: (view[at : at + UPLOAD_BYTES] for at in range(0, len(view), UPLOAD_BYTES)))

    def same_bytes(self, name: str, data: Bytes) -> bool:
        if self.size(name) != len(data):
            return False
        view = memoryview(data)
        with self.open_read(name) as file:
            parts = (view[at : at + CHUNK_BYTES] for at in range(0, len(view), CHUNK_BYTES))
            return all(equal_bytes(memoryview(file.read(len(part))), part) for part in parts)

    def upload(self, local_file: Path, name: str) -> None:
        with LocalStorage(local_file.parent)._opened(local_file.name) as source:
            self._put(name, lambda: parts_of(source))

    def download(self, name: str, local_file: Path) -> None:
        with self.open_read(name) as source:
            LocalStorage(local_file.parent).write_parts(local_file.name, lambda: parts_of(source))

    def rename_tree(self, source: str, target: str) -> None:
        for name in self._files_below(source):  # each is copied again if need be, and none goes before all are there
            self._copy(f"{source}{name}", f"{target}{name}")
        self.remove_tree(source)

    @retrying("write")
    def _put(self, name: str, parts: Parts) -> None:
        with self._in_folder(self._key(name), self.filesystem.open_output_stream) as file:
            for part in parts():
                file.write(part)
                file.flush()  # or pyarrow would hold a copy of all that is not yet sent

    @retrying("rename")
    def _files_below(self, name: str) -> tuple[str, ...]:
        """The rest of the name of each file, from the "/" after `name`."""
        from pyarrow.fs import FileSelector

        key = self._key(name)
        below = self.filesystem.get_file_info(FileSelector(key, recursive=True))
        return tuple(info.path[len(key) :] for info in below if info.is_file)

    @retrying("copy")
    def _copy(self, source: str, target: str) -> None:
        self._in_folder(self._key(target), functools.partial(self.filesystem.copy_file, self._key(source)))

    @retrying("delete")
    def remove_tree(self, name: str) -> None:
        info = self._info(name)
        if info.is_file:
            self.filesystem.delete_file(self._key(name))
        elif self._found(info):
            self.filesystem.delete_dir(self._key(name))

    @retrying("read")
    def _opened(self, name: str) -> Any:
        return self.filesystem.open_input_file(self._key(name))

    def _in_folder(self, key: str, make: Callable[[str], Any]) -> Any:
        """make(key), once more with its folder made where the file system has real ones; object stores need none."""
        try:
            return make(key)
        except FileNotFoundError:
            self.filesystem.create_dir(folder_of(key), recursive=True)
            return make(key)

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _info(self, name: str) -> Any:
        return self.filesystem.get_file_info(self._key(name))

    @staticmethod
    def _found(info: Any) -> bool:
        from pyarrow.fs import FileType

        return info.type != FileType.NotFound


class _Reader(io.RawIOBase):
    """A file behind pyarrow. Each read is tried again by itself: a long download goes on where it broke off."""

    def __init__(self, file: Any, tried: Callable[[Callable[[], Any]], Any]) -> None:
        self._file, self._tried = file, tried
        self._at, self._end = 0, tried(file.size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._end - self._at)

    def _next(self, size: int) -> bytes:
        size = max(0, min(size, self._end - self._at))
        data: bytes = self._tried(functools.partial(self._file.read_at, size, self._at))
        self._at += len(data)
        return data
