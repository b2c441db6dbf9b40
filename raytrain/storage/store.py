"""The checkpoints of one run: when to save, what to keep, which to trust."""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

from raytrain.errors import CheckpointError, TaskError
from raytrain.progress import Progress
from raytrain.storage.checkpoint import (
    Manifest,
    discard_checkpoint,
    read_manifest,
    recover_checkpoint,
    verify_checkpoint,
    write_checkpoint,
    write_metrics,
)
from raytrain.storage.paths import parse_temporary
from raytrain.storage.storage import Storage

FOLDER = "ckpt"
SUPERSEDED = f"{FOLDER}/superseded"
NEWEST = 2  # of all checkpoints: they stay first, so that one that is found damaged has another near behind it
NAME = re.compile(r"checkpoint_(epoch|step)_[0-9]{1,15}")  # no path, and no number too large to reckon with


class CheckpointPolicy(Protocol):
    """The CHECKPOINT section of the config."""

    EVERY_EPOCHS: int | None
    EVERY_STEPS: int | None
    EVERY_SECONDS: Any  # seconds, "auto" or None
    OVERHEAD: float
    SNAPSHOT_EVERY: Any  # steps, "auto" or None
    KEEP_LAST: int
    KEEP_BEST: int
    METRIC: str | None
    MODE: Any  # "max" or "min"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that has been verified. `name` is its folder in ckpt/, `path` its full path or URI."""

    name: str
    path: str
    manifest: Manifest


@dataclasses.dataclass(frozen=True)
class Listed:
    """A checkpoint as found in ckpt/: its manifest (sizes are right, content not yet checked), or what is wrong."""

    name: str
    manifest: Manifest | None
    damage: str = ""


class Store:
    """Checkpoints in the ckpt/ folder of one run. Rank 0 saves and tidies up; every rank may load."""

    def __init__(self, storage: Storage, policy: CheckpointPolicy, launch: str) -> None:
        self.storage = storage
        self.policy = policy
        self.launch = launch

    def progress_due(self, progress: Progress, *, epoch_done: bool) -> bool:
        """True if EVERY_EPOCHS or EVERY_STEPS asks for a checkpoint: the same on every rank."""
        epochs, steps = self.policy.EVERY_EPOCHS, self.policy.EVERY_STEPS
        if epoch_done and epochs and progress.epoch % epochs == 0:
            return True
        return steps is not None and progress.step % steps == 0

    def save(self, data: bytes | memoryview, manifest: Manifest, now: float) -> Saved:
        """The checkpoint whose checkpoint.pth is `data`, written and read back; then what is not kept goes.

        now: unix seconds. `launch` and `created` of the manifest are filled in here.
        """
        created = datetime.datetime.fromtimestamp(now, datetime.timezone.utc).isoformat(timespec="seconds")
        name = checkpoint_name(manifest.progress)
        manifest = dataclasses.replace(manifest, launch=self.launch, created=created)
        manifest = write_checkpoint(self.storage, f"{FOLDER}/{name}", data, manifest)
        saved = Saved(name, self.storage.path_of(f"{FOLDER}/{name}"), manifest)
        self._remove_all_but(saved)
        return saved

    def add_metrics(self, name: str, metrics: dict[str, float]) -> None:
        """Checkpoint `name` holds the metrics of its evaluation; then what the policy now does not keep is removed."""
        manifest = write_metrics(self.storage, f"{FOLDER}/{name}", metrics)
        self._remove_all_but(Saved(name, self.storage.path_of(f"{FOLDER}/{name}"), manifest))

    def is_better(self, metrics: dict[str, float], best: dict[str, Any] | None) -> bool:
        """True if `metrics` beat those of `best` by METRIC and MODE; NaN beats nothing."""
        metric = self.policy.METRIC
        if metric is None:
            return False
        if metric not in metrics:
            raise TaskError(
                f"CHECKPOINT.METRIC is {metric!r}, which the evaluation does not give; "
                f"it gives {', '.join(metrics) or 'nothing'}. Set CHECKPOINT.METRIC to one of these, or to null"
            )
        if not math.isfinite(metrics[metric]):
            return False
        sign = 1 if self.policy.MODE == "max" else -1
        before = best["metrics"].get(metric) if best else None  # None too if METRIC was another then
        return before is None or sign * metrics[metric] > sign * before

    def verified(self, name: str) -> Saved:
        """Checkpoint `name`, every byte of it checked; a CheckpointError says what is wrong."""
        return verified(self.storage, name)

    def listed(self) -> list[Listed]:
        """All checkpoints, newest first by their progress; a damaged one where its name says, else in front."""
        return listed(self.storage)

    def latest_verified(self) -> tuple[Saved | None, list[tuple[str, str]]]:
        """The newest checkpoint that verifies, and (name, what is wrong) of each newer one that does not."""
        return newest_verified(self.storage)

    def best(self) -> Saved | None:
        """The verified checkpoint with the best METRIC, the first of equals; None where none has one."""
        for entry in self.ranked(self.listed()):
            try:
                return self.verified(entry.name)
            except CheckpointError:
                continue  # damaged: the next best one is the best that exists
        return None

    def supersede(self, progress: Progress, others: Sequence[str] = ()) -> list[str]:
        """Names of the checkpoints beyond `progress`, now in ckpt/superseded/<launch>/, which retention never touches.

        For a run that goes back to an older checkpoint on purpose.   others: files that are to go there too
        """
        entries = self.listed()
        here = (progress.epoch, progress.cursor, 0)
        names = [*(entry.name for entry in entries if _position(entry, entries) > here), *others]
        for name in names:
            target = f"{SUPERSEDED}/{self.launch}/{name}"
            again = 2
            while self.storage.exists(target):
                target, again = f"{SUPERSEDED}/{self.launch}/{name}-{again}", again + 1
            self.storage.rename_tree(f"{FOLDER}/{name}", target)
        return names

    def clean_leftovers(self) -> None:
        """What a writer that died in mid-save left is put in place if it is whole and needed, else removed.

        Before anything is read from the store, on rank 0, at the start of a run.
        """
        for folder in ("", f"{FOLDER}/"):
            for name in self.storage.list(folder.rstrip("/")):
                left = parse_temporary(name)
                if left is None or left.writer_lives:
                    continue
                if folder and left.kind == "writing" and left.name.startswith("checkpoint_"):
                    recover_checkpoint(self.storage, folder + name, folder + left.name)
                else:
                    self.storage.remove_tree(folder + name)

    def _remove_all_but(self, sure: Saved) -> None:
        """Everything goes that the policy does not keep; `sure`, which has just been verified, stays.

        A damaged checkpoint counts for nothing and goes only when all that is kept is newer:
        until then it may be what is left of the only copy.
        """
        entries = self.listed()
        whole = [entry for entry in entries if entry.manifest is not None]
        wanted = dict.fromkeys(entry.name for entry in [*whole[:NEWEST], *self._asked_for(whole), *whole])
        kept = {sure.name, *list(wanted)[: self.policy.KEEP_LAST]}
        kept |= {entry.name for entry in self.ranked(whole)[: self.policy.KEEP_BEST]}
        if not whole:
            return  # somebody has deleted even the one that was just saved
        oldest = min(_position(entry, entries) for entry in whole if entry.name in kept)
        for entry in entries:
            if entry.name not in kept and (entry in whole or _position(entry, entries) < oldest):
                discard_checkpoint(self.storage, f"{FOLDER}/{entry.name}")

    def _asked_for(self, entries: list[Listed]) -> list[Listed]:
        """Those of `entries` that EVERY_EPOCHS or EVERY_STEPS asks for: not those saved because time had passed."""
        places = [(entry, entry.manifest.progress) for entry in entries if entry.manifest is not None]
        return [entry for entry, place in places if self.progress_due(place, epoch_done=place.cursor == 0)]

    def ranked(self, entries: list[Listed]) -> list[Listed]:
        """Those of `entries` that have METRIC, best first, and the older of equals first."""
        metric = self.policy.METRIC
        if metric is None:
            return []
        sign = -1.0 if self.policy.MODE == "max" else 1.0
        values = [
            (sign * value, e)
            for e in reversed(entries)
            if e.manifest and (value := (e.manifest.metrics or {}).get(metric)) is not None
        ]
        return [entry for _, entry in sorted(values, key=lambda pair: pair[0])]


def listed(storage: Storage) -> list[Listed]:
    """All checkpoints of a run folder, newest first: see Store.listed."""
    entries = []
    for name in storage.list(FOLDER):
        if NAME.fullmatch(name):
            try:
                entries.append(Listed(name, read_manifest(storage, f"{FOLDER}/{name}")))
            except CheckpointError as error:
                entries.append(Listed(name, None, str(error)))
    return sorted(entries, key=lambda entry: _position(entry, entries), reverse=True)


def verified(storage: Storage, name: str) -> Saved:
    """Checkpoint `name` of a run folder, every byte of it checked; a CheckpointError says what is wrong."""
    manifest = verify_checkpoint(storage, f"{FOLDER}/{name}")
    return Saved(name, storage.path_of(f"{FOLDER}/{name}"), manifest)


def newest_verified(storage: Storage) -> tuple[Saved | None, list[tuple[str, str]]]:
    """The newest checkpoint of a run folder that verifies, and (name, what is wrong) of each newer one."""
    while True:
        entries = listed(storage)
        found, passed_over = _first_sound(storage, entries)
        # What a keeper that still saves has removed meanwhile has given way to a newer one.
        if found is not None or [e.name for e in listed(storage)] == [e.name for e in entries]:
            return found, passed_over


def _first_sound(storage: Storage, entries: list[Listed]) -> tuple[Saved | None, list[tuple[str, str]]]:
    passed_over = []
    for entry in entries:
        if entry.manifest is None:
            passed_over.append((entry.name, entry.damage))
            continue
        try:
            return verified(storage, entry.name), passed_over
        except CheckpointError as error:
            passed_over.append((entry.name, str(error)))
    return None, passed_over


def checkpoint_name(progress: Progress) -> str:
    """The folder of the checkpoint at `progress`: by epoch where one has just ended, else by step."""
    return f"checkpoint_epoch_{progress.epoch}" if progress.cursor == 0 else f"checkpoint_step_{progress.step}"


def _position(entry: Listed, entries: list[Listed]) -> tuple[int, int, int]:
    """Where in the data it stands, to sort by: (epoch, cursor, 0) from the manifest, else what the name tells.

    Steps would not do: under another batch size (--allow-config-change) they count anew. A damaged
    checkpoint_step_<S> is put behind every whole one of no more steps, in the epoch that their
    pace tells: rather too new than too old, since what is old is removed.
    """
    if entry.manifest is not None:
        return entry.manifest.progress.epoch, entry.manifest.progress.cursor, 0
    kind, number = entry.name.split("_")[1:]
    if kind == "epoch":
        return int(number), 0, 0
    whole = [e.manifest.progress for e in entries if e.manifest is not None]
    before = max((p for p in whole if p.step <= int(number)), default=Progress(-1))
    paces = [p.step / p.epoch for p in whole if p.epoch > 0 and p.cursor == 0]
    epoch = int(int(number) / min(paces)) if paces else -1
    return max((before.epoch, before.cursor, int(number)), (epoch, 0, int(number)))
