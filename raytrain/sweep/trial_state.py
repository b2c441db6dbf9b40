"""What the run folder of a trial holds: its newest checkpoint, of which lineage that is, and what was evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from raytrain.config.schema import at
from raytrain.config.sections import Config
from raytrain.errors import RaytrainError
from raytrain.journal.records import read_journal
from raytrain.storage.storage import Storage
from raytrain.storage.store import Saved, newest_verified


def newest_of(storage: Storage) -> Saved | None:
    """The newest verified checkpoint of a run folder; None if there is none to trust."""
    with contextlib.suppress(RaytrainError):
        return newest_verified(storage)[0]
    return None


def is_of(cfg: Config, keys: Iterable[str], saved: Saved) -> bool:
    """Whether a checkpoint's weights are what a run of `cfg` has there, as far as the sweep decides it (`keys`)."""
    trained, wanted, progress = saved.manifest.config, cfg.to_tree(), saved.manifest.progress
    epochs = progress.epoch + (progress.cursor > 0)
    if any(at(trained, key) != at(wanted, key) for key in keys):
        return False
    return phases_before(trained, epochs) == phases_before(wanted, epochs)


def phases_before(tree: dict[str, Any], epochs: int) -> list[dict[str, Any]]:
    return [phase for phase in tree["OPTIMIZATION"].get("PHASES") or () if phase["FROM_EPOCH"] < epochs]


def evaluated(storage: Storage, epoch: int, since: int) -> dict[str, Any] | None:
    """The evaluation after `epoch` that the run folder tells of; those up to `since` are of another lineage."""
    if epoch <= since:
        return None
    evals = read_journal(storage, kinds=("eval",))
    return next((record for record in evals if record["epoch"] == epoch), None)
