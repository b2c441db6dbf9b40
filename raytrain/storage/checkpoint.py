"""One checkpoint: a folder with checkpoint.pth and manifest.json, which vouches for it.

The manifest is written last and holds the size and sha256 of every file, and its own
sha256. What no manifest vouches for is not a checkpoint. What is in checkpoint.pth is storage/state_file.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import IO, Any

import raytrain
from raytrain.errors import CheckpointError, StorageError
from raytrain.progress import Progress
from raytrain.storage.fingerprint import fingerprint_of
from raytrain.storage.paths import CHUNK_BYTES, temporary_name
from raytrain.storage.storage import Storage

PAYLOAD = "checkpoint.pth"
MANIFEST = "manifest.json"
WORLD = ("num_workers", "virtual_workers", "num_samples", "batch_size", "accumulate")
DAMAGE = {errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}  # of one checkpoint: no other has it too


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds and where it comes from.

    files:   name -> {"size_bytes", "sha256"}; write_checkpoint fills it
    metrics: name -> number; what is not a finite number is stored as None. None: not evaluated (yet)
    config:  the resolved config as a plain tree
    world:   num_workers, virtual_workers, num_samples, batch_size, accumulate; `built`: see training/sameness.py
    launch:  which launch of the run saved it;  created: UTC, ISO 8601.  Store.save fills both
    source:  digits of the sha256 of each file of the task's code, by its path; see training/source.py
    weights: the fingerprint of the tensors (storage/fingerprint.py), "" where there is none; write_checkpoint fills it
    """

    progress: Progress
    config: dict[str, Any]
    world: dict[str, Any]
    seed: int
    metrics: dict[str, float | None] | None = None
    launch: str = ""
    created: str = ""
    version: str = raytrain.__version__
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    source: dict[str, str] = dataclasses.field(default_factory=dict)
    weights: str = ""

    @property
    def metrics_with_nan(self) -> dict[str, float]:
        """The metrics as they were found, NaN where they were not finite; none where nothing was evaluated yet."""
        return {name: float("nan") if value is None else value for name, value in (self.metrics or {}).items()}

    def to_json(self) -> str:
        tree = dataclasses.asdict(self)
        if self.metrics is not None:
            tree["metrics"] = {name: _finite(value) for name, value in self.metrics.items()}
        tree = json.loads(json.dumps(tree, allow_nan=False))  # as it will be read: keys are strings, tuples are lists
        return json.dumps({**tree, "sha256": _tree_sha256(tree)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        try:
            tree = json.loads(text, parse_constant=_refused)
            if tree.pop("sha256") != _tree_sha256(tree):
                raise CheckpointError("its content does not match its own sha256")
            tree = {"source": {}, "weights": "", **tree}  # none of the checkpoints of earlier versions has these
            fields = {field.name: tree[field.name] for field in dataclasses.fields(Manifest)}
            fields["progress"] = Progress(**tree["progress"])
            fields["files"] = {
                name: {"size_bytes": facts["size_bytes"], "sha256": facts["sha256"]}
                for name, facts in tree["files"].items()
            }
            if PAYLOAD not in fields["files"]:
                raise CheckpointError(f"it does not list {PAYLOAD}")
            return _typed(Manifest(**fields))
        except KeyError as error:
            raise CheckpointError(f"it lacks {error}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"it is not a manifest of raytrain: {error}") from error


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _typed(manifest: Manifest) -> Manifest:
    """`manifest`, whose sha256 anybody can make, with all of its fields of the types that the rest relies on."""
    numbers = [*dataclasses.astuple(manifest.progress), *(f["size_bytes"] for f in manifest.files.values())]
    if not all(type(value) is int and 0 <= value < 2**63 for value in (*numbers, manifest.seed)):
        raise CheckpointError("its progress, sizes and seed should be whole numbers")
    if not all(type(value) in (int, float, type(None)) for value in (manifest.metrics or {}).values()):
        raise CheckpointError("its metrics should be numbers")
    if any(type(value) is int and abs(value) > 2**63 for value in (manifest.metrics or {}).values()):
        raise CheckpointError("its metrics should be numbers that a float can hold")
    if not (isinstance(manifest.config, dict) and isinstance(manifest.world, dict)):
        raise CheckpointError("its config and world should be mappings")
    if not all(type(manifest.world.get(name)) is int for name in WORLD):
        raise CheckpointError(f"its world should have whole numbers as {', '.join(WORLD)}")
    if not _is_record(manifest.world.get("built", {})):
        raise CheckpointError("its record of what the task built should be mappings of texts")
    optimization = manifest.config.get("OPTIMIZATION", {})
    phases = optimization.get("PHASES") or [] if isinstance(optimization, dict) else None
    if not isinstance(phases, list) or not all(
        isinstance(phase, dict) and type(phase.get("FROM_EPOCH")) is int for phase in phases
    ):
        raise CheckpointError("its config's OPTIMIZATION and PHASES should be those of a config")
    if not (isinstance(manifest.source, dict) and all(isinstance(hash_, str) for hash_ in manifest.source.values())):
        raise CheckpointError("its source should be a mapping of files to texts")
    if not all(
        isinstance(text, str) for text in (manifest.launch, manifest.created, manifest.version, manifest.weights)
    ):
        raise CheckpointError("its launch, created, version and weights should be texts")
    return manifest


def _is_record(built: Any) -> bool:
    """Whether it may be one of training/sameness.py."""
    if not isinstance(built, dict) or type(built.get("hash_seed", "")) is not str:
        return False
    parts = [built.get(name, {}) for name in ("num_samples", "names", "samples")]
    return all(isinstance(part, dict) for part in parts) and all(isinstance(each, dict) for each in parts[2].values())


def write_checkpoint(storage: Storage, name: str, data: bytes | memoryview, manifest: Manifest) -> Manifest:
    """The manifest of checkpoint `name`, which is on the storage in full, and was read back, when this returns.

    data: the bytes of checkpoint.pth
    A checkpoint of that name gives way only to one that is complete and verified beside it: at
    every moment one of the two exists in full, and `recover_checkpoint` finds it after a crash.
    """
    replaces = storage.exists(name)
    # An object store cannot rename, and copying is slow: there a free name is written in place, manifest last.
    stage = temporary_name("writing", name) if storage.is_local or replaces else name
    try:
        manifest = _write_files(storage, stage, data, manifest)
    except BaseException:
        with contextlib.suppress(StorageError):  # the failure above is the one to tell
            storage.remove_tree(stage)
        raise
    if replaces:
        discard_checkpoint(storage, name)
    if stage != name:
        storage.rename_tree(stage, name)
    return manifest


def write_metrics(storage: Storage, name: str, metrics: Mapping[str, float | None]) -> Manifest:
    """The manifest of checkpoint `name`, which from now on holds these metrics."""
    manifest = dataclasses.replace(read_manifest(storage, name), metrics=dict(metrics))
    storage.write_bytes(f"{name}/{MANIFEST}", manifest.to_json().encode())
    return manifest


def recover_checkpoint(storage: Storage, leftover: str, name: str) -> None:
    """`leftover`, which a dead writer left of checkpoint `name`, is put in place if that is needed, else removed."""
    if is_verified(storage, name) or not is_verified(storage, leftover):
        storage.remove_tree(leftover)
        return
    discard_checkpoint(storage, name)
    storage.rename_tree(leftover, name)


def discard_checkpoint(storage: Storage, name: str) -> None:
    """Checkpoint `name` is gone at once as far as readers are concerned, then its files go."""
    if not storage.exists(name):
        return
    if not storage.is_local:
        storage.remove_tree(f"{name}/{MANIFEST}")
        storage.remove_tree(name)
        return
    trash = temporary_name("trash", name)
    storage.rename_tree(name, trash)
    # NFS keeps a folder as long as somebody reads a file in it. The name is free; Store removes old trash later.
    with contextlib.suppress(StorageError):
        storage.remove_tree(trash)


def read_manifest(storage: Storage, name: str) -> Manifest:
    """The manifest of checkpoint `name`, after a look at names and sizes only; a CheckpointError says what is wrong."""
    path = storage.path_of(name)
    with damage_named(path):
        present = storage.list(name)
        if MANIFEST not in present:
            raise CheckpointError(f"{path}: {MANIFEST} is missing, so it was never finished or has been damaged")
        try:
            manifest = Manifest.from_json(storage.read_bytes(f"{name}/{MANIFEST}"))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {MANIFEST} is damaged: {error}") from error
        for file, facts in manifest.files.items():
            if file not in present:
                raise CheckpointError(f"{path}: {file} is missing")
            size = storage.size(f"{name}/{file}")
            if size != facts["size_bytes"]:
                raise CheckpointError(f"{path}: {file} has {size} bytes, its manifest says {facts['size_bytes']}")
    return manifest


def verify_checkpoint(storage: Storage, name: str) -> Manifest:
    """The manifest of checkpoint `name`, every byte of which has been checked; a CheckpointError says what is wrong."""
    manifest = read_manifest(storage, name)
    with damage_named(storage.path_of(name)):
        for file in manifest.files:
            with storage.open_read(f"{name}/{file}") as stream:
                check_sha256(stream, storage.path_of(name), file, manifest)
    return manifest


def is_verified(storage: Storage, name: str) -> bool:
    """True if every byte of checkpoint `name` is what its manifest says."""
    try:
        verify_checkpoint(storage, name)
    except CheckpointError:
        return False
    return True


def _write_files(storage: Storage, folder: str, data: bytes | memoryview, manifest: Manifest) -> Manifest:
    """The manifest with its files, all of them written into `folder`, the manifest last."""
    name = f"{folder}/{PAYLOAD}"
    storage.write_bytes(name, data)
    if not storage.same_bytes(name, data):
        raise CheckpointError(
            f"{storage.path_of(name)}: what was read back is not what was written; the disk or the memory fails. "
            "Choose another OUTPUT, then run the same command again"
        )
    facts = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = dataclasses.replace(manifest, files={PAYLOAD: facts}, weights=fingerprint_of(memoryview(data)))
    storage.write_bytes(f"{folder}/{MANIFEST}", manifest.to_json().encode())
    return manifest


def check_sha256(stream: IO[bytes], path: str, file: str, manifest: Manifest) -> None:
    sha256 = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        sha256.update(chunk)
    if sha256.hexdigest() != manifest.files[file]["sha256"]:
        raise CheckpointError(f"{path}: {file} is damaged: its sha256 is not what the manifest says")


@contextlib.contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turns a bad sector, a file that goes while it is read or is a folder, into a CheckpointError.

    Other storage errors (no permission, no network) stay what they are: they say nothing
    about this checkpoint, and to pass over all of them would start the run over.
    """
    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and (isinstance(cause, FileNotFoundError) or cause.errno in DAMAGE):
            raise CheckpointError(f"{path}: {error}") from error
        raise


def _tree_sha256(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> float | None:
    """`value` (a number of any library) as a float; None if it is not finite, or no number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
