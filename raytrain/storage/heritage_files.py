"""OpenPCDet's checkpoints in a folder: its .pth files, by how far the run was that wrote them."""

from __future__ import annotations

from typing import NamedTuple

from raytrain.errors import CheckpointError, masked
from raytrain.storage.state_file import load_file
from raytrain.storage.storage import Storage

SUFFIX = ".pth"
MOMENTS = "_optim.pth"  # beside a file whose optimizer's state is in one of its own


class HeritageFile(NamedTuple):
    """path: for people and for loading.   epoch, step: finished; -1 of one that is damaged, `damage` says how"""

    name: str
    path: str
    epoch: int
    step: int
    damage: str = ""


def heritage_files(storage: Storage, folder: str) -> list[HeritageFile]:
    """Those of a folder of a storage, the newest first by what is in them; what cannot be read comes before all."""
    names = [name for name in storage.list(folder) if name.endswith(SUFFIX) and not name.endswith(MOMENTS)]
    found = [_read(storage, f"{folder}/{name}".lstrip("/")) for name in names]
    return sorted(found, key=lambda file: (bool(file.damage), file.epoch, file.step, file.name), reverse=True)


def _read(storage: Storage, name: str) -> HeritageFile:
    path, short = storage.path_of(name), name.rpartition("/")[2]
    if "://" in path:
        return HeritageFile(
            short, path, -1, -1, f"{masked(path)}: copy it to a disk, and name it there (--resume PATH)"
        )
    try:
        with storage.local_copy(name) as local:
            content = load_file(local, mmap=True)
            if not isinstance(content, dict) or not isinstance(content.get("model_state"), dict):
                return HeritageFile(short, path, -1, -1, f"{masked(path)}: it holds no model_state")
            epoch, step = (int(content.get(key) or 0) for key in ("epoch", "it"))
    except (CheckpointError, ValueError, TypeError) as error:
        return HeritageFile(short, path, -1, -1, str(error))
    return HeritageFile(short, path, epoch, step)
