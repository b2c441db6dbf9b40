"""The files of one run folder, on a local disk or behind any pyarrow file system.

Names are relative to the folder, with "/" between their parts; "" is the folder itself.
What may pass (a connection that is reset, a server that asks to slow down) is tried again
for a minute. Whatever goes wrong is a StorageError that says which path and what to do about it.
"""

from __future__ import annotations

import functools
import re
import urllib.parse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from raytrain.errors import ConfigError
from raytrain.storage.arrow import ArrowStorage, filesystem_of
from raytrain.storage.local import LocalStorage
from raytrain.storage.paths import Bytes
from raytrain.storage.retry import RETRY_S, with_retries


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


def open_storage(uri_or_path: str, retry_s: float = RETRY_S) -> Storage:
    """The storage of a local path, a file:// URI, or any URI that pyarrow knows (s3://, gs://, hdfs://, ...).

    retry_s: how long each operation tries again what may pass
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", uri_or_path)
    if scheme is None:
        if "://" in uri_or_path or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", uri_or_path):  # Path would make folders of it
            raise ConfigError(
                f"{uri_or_path}: this is neither a path nor a URI. Write a path, or a URI such as s3://bucket/folder"
            )
        return LocalStorage(Path(uri_or_path), retry_s)
    if scheme[1].lower() == "file":
        parts = urllib.parse.urlsplit(uri_or_path)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ConfigError(f"{uri_or_path}: this names no path. Write it as file:///folder/on/this/machine")
        return LocalStorage(Path(urllib.parse.unquote(parts.path)), retry_s)
    if ":***@" in uri_or_path:
        raise ConfigError(
            f"{uri_or_path}: the secret in this URI was masked when it was written down. Leave it out, with the key, "
            "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; or give the whole URI with --output"
        )
    filesystem, root = with_retries("open", uri_or_path, functools.partial(filesystem_of, uri_or_path), retry_s)
    return ArrowStorage(filesystem, root, uri_or_path, retry_s)
