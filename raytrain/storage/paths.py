"""Names of files and folders, local or behind a URI, and of what is being written or thrown away."""

from __future__ import annotations

import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from raytrain.errors import ConfigError
from raytrain.storage.processes import started_at

CHUNK_BYTES = 1 << 20
READ_BYTES = 8 << 20  # one request to an object store

Bytes = bytes | memoryview | mmap.mmap
Parts = Callable[[], Iterable[bytes | memoryview]]  # of a file, in order, as often as it has to be written


def expanded(path: str | os.PathLike[str], key: str = "") -> Path:
    """`path`, with a `~` at its start as the home folder that it means; a ConfigError names `key`, which held it."""
    where = f"{key} is {os.fspath(path)!r}" if key else f"{path}"
    if "\0" in os.fspath(path):
        raise ConfigError(f"{where}: no path has a NUL character in it. Write it without")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{where}: there is no user of that name here. Write the path without ~") from None


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


def parts_of(file: IO[bytes]) -> Iterator[bytes]:
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


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]
