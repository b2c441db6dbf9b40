"""Arrays that take a while to make, kept in a file under a digest of what they were made of."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import StorageError
from raytrain.storage.local import LocalStorage

WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
Arrays = dict[str, NDArray[Any]]


def cached_arrays(path: Path, digest: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in `path` if they were made of what has this `digest`, else those that `make` gives.

    Those are kept in `path` for the next time; where it cannot be written, they are made each time.
    Several processes may do so at once: each file is written beside and renamed.
    """
    kept = _read(path, digest)
    if kept is not None:
        return kept
    arrays = make()
    if not path.parent.stat().st_mode & WRITABLE:  # root could write there all the same, and is not asked to
        return arrays
    file = io.BytesIO()
    named: dict[str, Any] = {**arrays, "digest": np.array(digest)}
    np.savez(file, **named)
    try:
        LocalStorage(path.parent).write_bytes(path.name, file.getvalue())
    except StorageError:  # not this user's, or a disk that is full
        pass
    return arrays


def _read(path: Path, digest: str) -> Arrays | None:
    """None where there is no such file, or it is damaged (a zip file has checksums) or made of something else."""
    try:
        # Opened here: np.load leaves the file of an archive open in which it finds no directory.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if str(file["digest"]) != digest:
                return None
            return {name: file[name] for name in file.files if name != "digest"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
