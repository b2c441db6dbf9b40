"""What checkpoint.pth holds, as bytes: written, and read without running any code that is in it."""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from raytrain.errors import CheckpointError
from raytrain.storage.archive import MemoryFile
from raytrain.storage.checkpoint import MANIFEST, PAYLOAD, check_sha256, damage_named, read_manifest
from raytrain.storage.file_layout import leaves_of, put_together, save
from raytrain.storage.paths import expanded
from raytrain.storage.storage import Storage, open_storage


def dumps(payload: dict[str, Any]) -> bytes:
    """The bytes of checkpoint.pth; CheckpointError if it holds what cannot be saved, or what loading would refuse."""
    file, leaves = io.BytesIO(), leaves_of(payload)
    save(put_together(leaves.structure, [owned(tensor) for tensor in leaves.tensors], leaves.numbers), file)
    data = file.getvalue()
    check_loadable(memoryview(data))
    return data


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """As a copy if it is part of a larger memory, since torch.save writes the whole of that."""
    part = tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if part else tensor


def loads(data: memoryview, where: str, map_location: Any = "cpu") -> dict[str, Any]:
    """The payload whose checkpoint.pth is in memory; its tensors are copies. `where` is for messages."""
    return _load(cast(IO[bytes], MemoryFile(data)), where, map_location)


def check_loadable(data: memoryview) -> None:
    """CheckpointError if a checkpoint.pth holds objects that loading would refuse."""
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(cast(IO[bytes], MemoryFile(data)))
    if refused:
        raise CheckpointError(
            f"the state holds objects of {', '.join(sorted(refused))}, which loading would refuse; "
            "keep tensors, numbers, strings, lists and dicts in it"
        )


def load_payload(storage: Storage, name: str, map_location: Any = "cpu") -> dict[str, Any]:
    """The payload of checkpoint `name`, read from the very file whose sha256 has just been checked."""
    manifest = read_manifest(storage, name)
    with (
        damage_named(storage.path_of(name)),
        storage.local_copy(f"{name}/{PAYLOAD}") as path,
        path.open("rb") as file,
    ):
        check_sha256(file, storage.path_of(name), PAYLOAD, manifest)
        file.seek(0)
        where = storage.path_of(f"{name}/{PAYLOAD}")
        return _with_model_state(_load(file, where, map_location), where)


def load_weights_file(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The dict in a bare .pth file of ours or of OpenPCDet: model_state, and what else was saved with it.

    A file of ours that still stands beside its manifest is checked against it. No code in the
    file is ever run; of OpenPCDet's, numpy scalars are let through.
    """
    path = expanded(path).absolute()
    return _with_model_state(load_file(path, map_location), str(path))


def load_file(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """What torch.save wrote to a file, of whatever program; as load_weights_file, without a look at what it holds.

    mmap: its tensors stay in the file until they are used, where it is one of today's
    """
    path = expanded(path).absolute()
    if path.name == PAYLOAD and (path.parent / MANIFEST).exists():
        return load_payload(open_storage(str(path.parent.parent)), path.parent.name, map_location)
    try:
        if mmap and zipfile.is_zipfile(path):
            return _load(path, str(path), map_location, mmap=True)
        with path.open("rb") as file:
            return _load(file, str(path), map_location)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _load(file: IO[bytes] | Path, path: str, map_location: Any, mmap: bool = False) -> Any:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what cannot be read is told below
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the bytes are anybody's: what reading them raises has no bounds
        refused = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if refused:
            raise CheckpointError(
                f"{path}: refused, because loading it would call {refused[1]}; only tensors and plain values are loaded"
            ) from error
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip()  # before it: how to load it unsafely
        what = (said or "it ends too early").splitlines()[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint: {type(error).__name__}: {what}. "
            "Give a file that torch.save wrote, whole; other pickles could run code and are not loaded"
        ) from error


def _with_model_state(payload: Any, path: str) -> dict[str, Any]:
    """`payload`, if it is one of ours or of OpenPCDet's."""
    if not isinstance(payload, dict) or not isinstance(payload.get("model_state"), dict):
        found = f"the keys {list(payload)[:8]}" if isinstance(payload, dict) else f"a {type(payload).__name__}"
        raise CheckpointError(f"{path}: it should hold a dict with 'model_state', but holds {found}")
    return payload


def _numpy_scalars() -> list[Any]:
    """What unpickling a numpy number needs, under the names that numpy 1 and numpy 2 write."""
    scalar = np.float64(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    kinds = [np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_]
    return [*((scalar, name) for name in names), np.dtype, *(type(np.dtype(kind)) for kind in kinds)]
