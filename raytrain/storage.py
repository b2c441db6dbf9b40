"""The files of one run folder, on a local disk or behind any pyarrow file system.

Names are relative to the folder, with "/" between their parts; "" is the folder itself.
Whatever goes wrong is a StorageError that says which path and what to do about it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import secrets
import shutil
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from raytrain.errors import ConfigError, StorageError

CHUNK_BYTES = 1 << 20


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

    def open_write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A new file, on the disk when the context ends. Not atomic: for files that something else vouches for."""

    def write_file(self, name: str, data: bytes | memoryview) -> None: ...

    def holds(self, name: str, data: bytes | memoryview) -> bool: ...

    def read_bytes(self, name: str) -> bytes: ...

    def write_bytes(self, name: str, data: bytes) -> None:
        """Readers see the old bytes of `name` or all of `data`, also after a crash."""

    def upload(self, local_file: Path, name: str) -> None: ...

    def download(self, name: str, local_file: Path) -> None: ...

    def rename_tree(self, source: str, target: str) -> None:
        """`source` under the name `target`, which must be free. Local: atomic; else all is copied, then deleted."""

    def remove_tree(self, name: str) -> None:
        """`name`, a folder or a file, is gone; nothing happens where it does not exist."""


def open_storage(uri_or_path: str) -> Storage:
    """The storage of a local path, a file:// URI, or any URI that pyarrow knows (s3://, gs://, hdfs://, ...)."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", uri_or_path)
    if scheme is None:
        return LocalStorage(Path(uri_or_path))
    if scheme[1].lower() == "file":
        return LocalStorage(Path(urllib.parse.unquote(urllib.parse.urlsplit(uri_or_path).path)))
    from pyarrow.fs import FileSystem

    with _explained("open", uri_or_path):
        try:
            filesystem, root = FileSystem.from_uri(uri_or_path)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(
                f"{uri_or_path}: pyarrow cannot open this: {error}. Use a local path or a URI such as s3://bucket/folder"
            ) from error
    return ArrowStorage(filesystem, root, uri_or_path)


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


class _Files:
    def write_file(self, name: str, data: bytes | memoryview) -> None:
        with self.open_write(name) as file:  # type: ignore[attr-defined]
            file.write(data)

    def holds(self, name: str, data: bytes | memoryview) -> bool:
        with self.open_read(name) as file:  # type: ignore[attr-defined]
            return bool(file.read() == data)


class LocalStorage(_Files):
    """A folder on a disk of this machine, or one that is mounted (NFS, FUSE)."""

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    def path_of(self, name: str) -> str:
        return str(self.local_path(name))

    def local_path(self, name: str) -> Path:
        return self.root / name if name else self.root

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        yield self.local_path(name)

    def exists(self, name: str) -> bool:
        path = self.local_path(name)
        with _explained("look at", path):
            try:
                path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def list(self, name: str) -> list[str]:
        path = self.local_path(name)
        with _explained("list", path):
            try:
                return sorted(child.name for child in path.iterdir())
            except FileNotFoundError:
                return []

    def size(self, name: str) -> int:
        path = self.local_path(name)
        with _explained("look at", path):
            return path.stat().st_size

    def makedirs(self, name: str) -> None:
        path = self.local_path(name)
        with _explained("make the folder", path):
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            for folder in missing:
                _sync_folder(folder.parent)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        path = self.local_path(name)
        with _explained("read", path), path.open("rb") as file:
            yield file

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[IO[bytes]]:
        path = self.local_path(name)
        self.makedirs(_folder_of(name))
        with _explained("write", path), path.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def read_bytes(self, name: str) -> bytes:
        with self.open_read(name) as file:
            return file.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        self._replace(name, io.BytesIO(data))

    def upload(self, local_file: Path, name: str) -> None:
        with _explained("read", local_file), open(local_file, "rb") as source:
            self._replace(name, source)

    def download(self, name: str, local_file: Path) -> None:
        with self.open_read(name) as source:
            LocalStorage(local_file.parent)._replace(local_file.name, source)

    def _replace(self, name: str, source: IO[bytes]) -> None:
        path, beside = self.local_path(name), temporary_name("writing", name)
        try:
            with self.open_write(beside) as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
            with _explained("write", path):
                self.local_path(beside).replace(path)
                _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # the failure above is the one to tell
                self.local_path(beside).unlink(missing_ok=True)
            raise

    def rename_tree(self, source: str, target: str) -> None:
        old, new = self.local_path(source), self.local_path(target)
        self.makedirs(_folder_of(target))
        with _explained(f"rename to {new}", old):
            if old.is_dir():
                _sync_folder(old)  # its entries reach the disk before the name that vouches for them
            old.rename(new)
            for folder in {old.parent, new.parent}:
                _sync_folder(folder)

    def remove_tree(self, name: str) -> None:
        path = self.local_path(name)
        with _explained("delete", path):
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except FileNotFoundError:
                return
            _sync_folder(path.parent)


class ArrowStorage(_Files):
    """A folder of a pyarrow file system. Puts are whole; renames are copies followed by deletes."""

    is_local = False

    def __init__(self, filesystem: Any, root: str, uri: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.uri = uri

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

    def exists(self, name: str) -> bool:
        return self._found(self._info(name))

    def list(self, name: str) -> list[str]:
        from pyarrow.fs import FileSelector

        with _explained("list", self.path_of(name)):
            children = self.filesystem.get_file_info(FileSelector(self._key(name), allow_not_found=True))
        return sorted(child.base_name for child in children)

    def size(self, name: str) -> int:
        info = self._info(name)
        if not info.is_file:
            raise StorageError(f"{self.path_of(name)}: cannot look at: there is no such file")
        return int(info.size)

    def makedirs(self, name: str) -> None:
        with _explained("make the folder", self.path_of(name)):
            self.filesystem.create_dir(self._key(name), recursive=True)

    @contextlib.contextmanager
    def open_read(self, name: str) -> Iterator[IO[bytes]]:
        with _explained("read", self.path_of(name)), self.filesystem.open_input_file(self._key(name)) as file:
            yield file

    @contextlib.contextmanager
    def open_write(self, name: str) -> Iterator[IO[bytes]]:
        make = self.filesystem.open_output_stream
        with _explained("write", self.path_of(name)), self._in_folder(self._key(name), make) as file:
            yield file

    def read_bytes(self, name: str) -> bytes:
        with self.open_read(name) as file:
            return file.read()

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.open_write(name) as file:
            file.write(data)

    def upload(self, local_file: Path, name: str) -> None:
        with _explained("read", local_file), open(local_file, "rb") as source, self.open_write(name) as file:
            shutil.copyfileobj(source, file, CHUNK_BYTES)

    def download(self, name: str, local_file: Path) -> None:
        with self.open_read(name) as source:
            LocalStorage(local_file.parent)._replace(local_file.name, source)

    def rename_tree(self, source: str, target: str) -> None:
        from pyarrow.fs import FileSelector

        old, new = self._key(source), self._key(target)
        with _explained(f"rename to {self.path_of(target)}", self.path_of(source)):
            for info in self.filesystem.get_file_info(FileSelector(old, recursive=True)):
                if info.is_file:
                    copy = functools.partial(self.filesystem.copy_file, info.path)
                    self._in_folder(new + info.path[len(old) :], copy)
        self.remove_tree(source)

    def remove_tree(self, name: str) -> None:
        info = self._info(name)
        with _explained("delete", self.path_of(name)):
            if info.is_file:
                self.filesystem.delete_file(self._key(name))
            elif self._found(info):
                self.filesystem.delete_dir(self._key(name))

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
        with _explained("look at", self.path_of(name)):
            return self.filesystem.get_file_info(self._key(name))

    @staticmethod
    def _found(info: Any) -> bool:
        from pyarrow.fs import FileType

        return info.type != FileType.NotFound


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
    return f"{folder}{slash}.{kind}-{last}-{pid}.{_start_of(pid)}-{secrets.token_hex(4)}"


def parse_temporary(name: str) -> Temporary | None:
    """What `temporary_name` put into `name` (without its folder), or None for any other name.

    Asked at the start of a run, before it writes: this very process counts as dead, and so does a
    writer on another machine. One folder has one run, and who starts it last owns it.
    """
    match = re.fullmatch(r"\.(writing|trash)-(.+)-(\d+)\.(\d*)-[0-9a-f]{8}", name)
    if match is None:
        return None
    kind, of, pid, start = match.groups()
    return Temporary(kind, of, int(pid) != os.getpid() and start != "" and _start_of(int(pid)) == start)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _start_of(pid: int) -> str:
    """When process `pid` began, in clock ticks since boot; "" if it is gone, or the system does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


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


@contextlib.contextmanager
def _explained(action: str, path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot {action}: {error.strerror or error}. {_advice(error)}") from error


def _advice(error: OSError) -> str:
    """What a person can do about `error`; pyarrow gives most of its own only as text."""
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return "Give the user that runs raytrain access to it, or choose another OUTPUT"
        case errno.EROFS:
            return "The file system is read-only; choose another OUTPUT"
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return "Free some space or lower CHECKPOINT.KEEP_LAST, then run the same command again"
        case errno.ENOTDIR | errno.EEXIST | errno.ENOTEMPTY:
            return "Something else stands at this path; move it away or choose another OUTPUT"
    text = str(error).lower()
    if "no_such_bucket" in text or "bucket does not exist" in text or "nosuchbucket" in text:
        return "Create the bucket or correct its name in OUTPUT"
    if re.search(r"access.?denied|credential|signature|access.?key|expired.?token|http status 40[13]|forbidden", text):
        return "Check the credentials of the machine that raytrain runs on (every node has its own) and their rights"
    if re.search(r"connect|timeout|timed out|resolve|network|curl", text):
        return "Check the network of this machine and the endpoint in the URI"
    if isinstance(error, FileNotFoundError):
        return "It does not exist, or something removed it meanwhile"
    return "Check that the path is right and the storage is healthy"
