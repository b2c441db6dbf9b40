"""The files of one run folder, on a local disk or behind any pyarrow file system.

Names are relative to the folder, with "/" between their parts; "" is the folder itself.
What may pass (a connection that is reset, a server that asks to slow down) is tried again
for a minute. Whatever goes wrong is a StorageError that says which path and what to do about it.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import io
import mmap
import os
import re
import secrets
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from raytrain.errors import ConfigError, StorageError
from raytrain.keeper.shared_memory import started_at
from raytrain.storage.direct_io import direct, equal, holds, write_all
from raytrain.storage.retry import PATIENCE_S, explained, patient, patiently

CHUNK_BYTES = 1 << 20
READ_BYTES = 8 << 20  # one request to an object store
UPLOAD_BYTES = 64 << 20  # so much of a file is on its way to an object store, in several parts at once
REQUEST_TRIES, REQUEST_S = 2, 3  # by pyarrow itself; its defaults are 31 tries, 99 s of a server that hangs

Bytes = bytes | memoryview | mmap.mmap
Parts = Callable[[], Iterable[bytes | memoryview]]  # of a file, in order, as often as it has to be written


class Storage(Protocol):
    """What a run folder can do, wherever it is."""

    @property
    def is_local(self) -> bool:
        """True where a rename is atomic and files have local paths."""

    def path_of(self, name: str) -> str:
        """The full path or URI of `name`, for people and for other programs."""

    def local_path(self, name: str) -> Path:
        """The path of `name` on this machine; a StorageError where there is none."""

    def local_copy(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the bytes of `name`: itself, or a download that goes when the context ends."""

    def exists(self, name: str) -> bool: ...

    def list(self, name: str) -> list[str]:
        """Names of the children of folder `name`, sorted; none where it does not exist."""

    def size(self, name: str) -> int:
        """Bytes in file `name`."""

    def makedirs(self, name: str) -> None: ...

    def open_read(self, name: str) -> AbstractContextManager[IO[bytes]]: ...

    def read_bytes(self, name: str) -> bytes: ...

    def write_bytes(self, name: str, data: Bytes) -> None:
        """Readers see the old bytes of `name` or all of `data`, also after a crash.

        Of 1 MiB and more, from memory aligned to pages (an mmap), they go to a local disk past the page cache.
        """

    def same_bytes(self, name: str, data: Bytes) -> bool:
        """Whether file `name` holds just `data`; where possible the disk is asked, not the page cache."""

    def upload(self, local_file: Path, name: str) -> None: ...

    def download(self, name: str, local_file: Path) -> None: ...

    def rename_tree(self, source: str, target: str) -> None:
        """`source` under the name `target`, which must be free. Local: atomic; else all is copied, then deleted.

        Where only `target` exists it has been done: an earlier try got through, and its answer was lost.
        """

    def remove_tree(self, name: str) -> None:
        """`name`, a folder or a file, is gone; nothing happens where it does not exist."""


def open_storage(uri_or_path: str, patience_s: float = PATIENCE_S) -> Storage:
    """The storage of a local path, a file:// URI, or any URI that pyarrow knows (s3://, gs://, hdfs://, ...).

    patience_s: how long each operation tries again what may pass
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", uri_or_path)
    if scheme is None:
        if "://" in uri_or_path or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", uri_or_path):  # Path would make folders of it
            raise ConfigError(
                f"{uri_or_path}: this is neither a path nor a URI. Write a path, or a URI such as s3://bucket/folder"
            )
        return LocalStorage(Path(uri_or_path), patience_s)
    if scheme[1].lower() == "file":
        parts = urllib.parse.urlsplit(uri_or_path)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"{uri_or_path}: this names no path. Write it as file:///folder/on/this/machine")
        return LocalStorage(Path(urllib.parse.unquote(parts.path)), patience_s)
    if ":***@" in uri_or_path:
        raise ConfigError(
            f"{uri_or_path}: the secret in this URI was masked when it was written down. Leave it out, with the key, "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; or give the whole URI with --output"
        )
    filesystem, root = patiently("open", uri_or_path, functools.partial(_filesystem, uri_or_path), patience_s)
    return ArrowStorage(filesystem, root, uri_or_path, patience_s)


def _filesystem(uri: str) -> tuple[Any, str]:
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


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path`, with a `~` at its start as the home folder that it means."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no user of that name here. Write the path without ~") from None


def joined(root: str, *names: str) -> str:
    """The path or URI of `names` below `root`; what a URI says after "?" (its region, its endpoint) stays behind."""
    if "://" not in root:
        return str(Path(root).joinpath(*names))
    address, mark, options = root.partition("?")
    return "/".join([address.rstrip("/"), *names]) + mark + options


def parent_and_name(path: str) -> tuple[str, str]:
    """What `joined` has put together: the path or URI of the folder, and the last name."""
    address, mark, options = path.partition("?") if "://" in path else (path, "", "")
    parent, _, name = address.rstrip("/").rpartition("/")
    return (parent or "/") + mark + options, name


class LocalStorage:
    """A folder on a disk of this machine, or one that is mounted (NFS, FUSE)."""

    is_local = True

    def __init__(self, root: Path, patience_s: float = PATIENCE_S) -> None:
        self.root = expanded(root).absolute()
        self.patience_s = patience_s

    def path_of(self, name: str) -> str:
        return str(self.local_path(name))

    def local_path(self, name: str) -> Path:
        return self.root / name if name else self.root

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self.local_path(name)

    @patient("look at")
    def exists(self, name: str) -> bool:
        try:
            self.local_path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @patient("list")
    def list(self, name: str) -> list[str]:
        try:
            return sorted(child.name for child in self.local_path(name).iterdir())
        except FileNotFoundError:
            return []

    @patient("look at")
    def size(self, name: str) -> int:
        return self.local_path(name).stat().st_size

    @patient("make the folder")
    def makedirs(self, name: str) -> None:
        path = self.local_path(name)
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _sync_folder(folder.parent)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        with self._opened(name) as file, explained("read", self.path_of(name)):
            yield file

    @patient("read")
    def read_bytes(self, name: str) -> bytes:
        return self.local_path(name).read_bytes()

    def write_bytes(self, name: str, data: Bytes) -> None:
        self.write_parts(name, lambda: [memoryview(data)])

    @patient("read")
    def same_bytes(self, name: str, data: Bytes) -> bool:
        with direct(self.local_path(name), os.O_RDONLY) as handle:
            return holds(handle, memoryview(data))

    def upload(self, local_file: Path, name: str) -> None:
        LocalStorage(local_file.parent).download(local_file.name, self.local_path(name))

    def download(self, name: str, local_file: Path) -> None:
        with self._opened(name) as source:
            LocalStorage(local_file.parent).write_parts(local_file.name, lambda: _parts_of(source))

    @patient("write")
    def write_parts(self, name: str, parts: Parts) -> None:
        """As write_bytes, of several parts."""
        path, beside = self.local_path(name), self.local_path(temporary_name("writing", name))
        self.makedirs(_folder_of(name))
        try:
            with direct(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle:
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
        self.makedirs(_folder_of(target))
        self._rename(source, target)

    @patient("rename")
    def _rename(self, source: str, target: str) -> None:
        old, new = self.local_path(source), self.local_path(target)
        if old.exists() or not new.exists():
            if old.is_dir():
                _sync_folder(old)  # its entries reach the disk before the name that vouches for them
            old.rename(new)
        for folder in {old.parent, new.parent}:
            _sync_folder(folder)

    @patient("delete")
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

    @patient("read")
    def _opened(self, name: str) -> IO[bytes]:
        return self.local_path(name).open("rb")


class ArrowStorage:
    """A folder of a pyarrow file system. Puts are whole; renames are copies followed by deletes."""

    is_local = False

    def __init__(self, filesystem: Any, root: str, uri: str, patience_s: float = PATIENCE_S) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.uri = uri
        self.patience_s = patience_s

    def path_of(self, name: str) -> str:
        return joined(self.uri, name) if name else joined(self.uri)

    def local_path(self, name: str) -> Path:
        raise StorageError(f"{self.path_of(name)} is not on a disk of this machine; use read_bytes or download")

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="raytrain-") as folder:
            copy = Path(folder) / name.rpartition("/")[2]
            self.download(name, copy)
            yield copy

    @patient("look at")
    def exists(self, name: str) -> bool:
        return self._found(self._info(name))

    @patient("list")
    def list(self, name: str) -> list[str]:
        from pyarrow.fs import FileSelector

        children = self.filesystem.get_file_info(FileSelector(self._key(name), allow_not_found=True))
        return sorted(child.base_name for child in children)

    @patient("look at")
    def size(self, name: str) -> int:
        info = self._info(name)
        if not info.is_file:
            raise StorageError(f"{self.path_of(name)}: cannot look at: there is no such file")
        return int(info.size)

    @patient("make the folder")
    def makedirs(self, name: str) -> None:
        self.filesystem.create_dir(self._key(name), recursive=True)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        tried = functools.partial(patiently, "read", self.path_of(name), patience_s=self.patience_s)
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
            return all(equal(memoryview(file.read(len(part))), part) for part in parts)

    def upload(self, local_file: Path, name: str) -> None:
        with LocalStorage(local_file.parent)._opened(local_file.name) as source:
            self._put(name, lambda: _parts_of(source))

    def download(self, name: str, local_file: Path) -> None:
        with self.open_read(name) as source:
            LocalStorage(local_file.parent).write_parts(local_file.name, lambda: _parts_of(source))

    def rename_tree(self, source: str, target: str) -> None:
        for name in self._files_below(source):  # each is copied again if need be, and none goes before all are there
            self._copy(f"{source}{name}", f"{target}{name}")
        self.remove_tree(source)

    @patient("write")
    def _put(self, name: str, parts: Parts) -> None:
        with self._in_folder(self._key(name), self.filesystem.open_output_stream) as file:
            for part in parts():
                file.write(part)
                file.flush()  # or pyarrow would hold a copy of all that is not yet sent

    @patient("rename")
    def _files_below(self, name: str) -> tuple[str, ...]:
        """The rest of the name of each file, from the "/" after `name`."""
        from pyarrow.fs import FileSelector

        key = self._key(name)
        below = self.filesystem.get_file_info(FileSelector(key, recursive=True))
        return tuple(info.path[len(key) :] for info in below if info.is_file)

    @patient("copy")
    def _copy(self, source: str, target: str) -> None:
        self._in_folder(self._key(target), functools.partial(self.filesystem.copy_file, self._key(source)))

    @patient("delete")
    def remove_tree(self, name: str) -> None:
        info = self._info(name)
        if info.is_file:
            self.filesystem.delete_file(self._key(name))
        elif self._found(info):
            self.filesystem.delete_dir(self._key(name))

    @patient("read")
    def _opened(self, name: str) -> Any:
        return self.filesystem.open_input_file(self._key(name))

    def _in_folder(self, key: str, make: Callable[[str], Any]) -> Any:
        """make(key), once more with its folder made where the file system has real ones; object stores need none."""
        try:
            return make(key)
        except FileNotFoundError:
            self.filesystem.create_dir(_folder_of(key), recursive=True)
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


def _parts_of(file: IO[bytes]) -> Iterator[bytes]:
    """All of an open file, from its start."""
    file.seek(0)
    while part := file.read(READ_BYTES):
        yield part


class Temporary(NamedTuple):
    """What the name of a temporary file or folder says about it."""

    kind: str
    name: str
    writer_lives: bool


def temporary_name(kind: str, name: str) -> str:
    """A free name beside `name` for what is being written or is trash; it tells who uses it.

    `.writing-<name>-<pid>.<start of that process>-<random>`: a pid alone comes back too
    soon in containers, and what a dead writer left would then look like a living one's.
    """
    folder, slash, last = name.rpartition("/")
    pid = os.getpid()
    return f"{folder}{slash}.{kind}-{last}-{pid}.{started_at(pid) or ''}-{secrets.token_hex(4)}"


def parse_temporary(name: str) -> Temporary | None:
    """What `temporary_name` put into `name` (without its folder), or None for any other name.

    Asked at the start of a run, before it writes: this very process counts as dead, and so does a
    writer on another machine. One folder has one run, and who starts it last owns it.
    """
    match = re.fullmatch(r"\.(writing|trash)-(.+)-(\d+)\.(\d*)-[0-9a-f]{8}", name)
    if match is None:
        return None
    kind, of, pid, start = match.groups()
    return Temporary(kind, of, int(pid) != os.getpid() and start != "" and started_at(int(pid)) == start)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


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
