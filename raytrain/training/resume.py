"""Which checkpoint a run goes on from, and whether it may under this config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain.config.load import ABSENT, config_diff
from raytrain.config.schema import is_default
from raytrain.config.sections import Config
from raytrain.engine.hardware import other_hardware
from raytrain.engine.pretrained import load_pretrained
from raytrain.engine.state import RunState, restore, restore_heritage
from raytrain.errors import CheckpointError, ResumeError
from raytrain.journal.records import read_journal
from raytrain.keeper.client import KeeperClient
from raytrain.keeper.snapshots import load_newest
from raytrain.progress import Plan, Progress
from raytrain.storage.checkpoint import MANIFEST, PAYLOAD, Manifest, verify_checkpoint
from raytrain.storage.heritage_files import HeritageFile, heritage_files
from raytrain.storage.paths import expanded, parent_and_name
from raytrain.storage.state_file import load_payload, load_weights_file
from raytrain.storage.storage import Storage, open_storage
from raytrain.storage.store import FOLDER, NAME, Saved, Store, checkpoint_name, newest_verified
from raytrain.training.job import Job
from raytrain.training.source import other_file, source_notes

# Going on with another value of these would feed wrong samples, or the same ones twice.
FIXED = {
    "TASK": "the model and data would be another's",
    "SEED": "the rest of the epoch would come in another order",
    "LOADER.SHUFFLE": "the rest of the epoch would come in another order",
    "LOADER.LAST": "steps and schedule would no longer mean the same",
    "OPTIMIZATION.BATCH_SIZE_PER_GPU": "steps and schedule would no longer mean the same",
    "OPTIMIZATION.ACCUMULATE": "steps and schedule would no longer mean the same",
    "OPTIMIZATION.OPTIMIZER": "the optimizer's state would not fit",
    "SCALE.VIRTUAL_WORKERS": "samples would be dealt out differently",
}
# These say where and how fast a run runs, not what it computes.
FREE = (
    *("OUTPUT", "TAG", "EXTRA_TAG", "EXP_GROUP_PATH", "CFG_FILE", "TUNE."),
    *(
        "SCALE.NUM_WORKERS",
        "SCALE.MIN_WORKERS",
        "SCALE.GROW_EVERY",
        "SCALE.MAX_FAILURES",
        "SCALE.HANG_TIMEOUT",
        "EVAL.PICTURES",
        "LOG.",
    ),
    *("SCALE.CPUS_PER_WORKER", "SCALE.GPUS_PER_WORKER", "SCALE.RESOURCES", "SCALE.ENV", "LOADER.WORKERS"),
    "LOADER.PREFETCH",
    *("CHECKPOINT.EVERY_SECONDS", "CHECKPOINT.OVERHEAD", "CHECKPOINT.SNAPSHOT_EVERY"),
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint that a run goes on from.

    path:   for people;   name: its name in this run's own store, None if it lies elsewhere
    notes:  what a user should know: what was passed over, which keys differ
    is_memory: whether it is no checkpoint but what the keeper holds
    """

    path: str
    name: str | None
    manifest: Manifest | None
    notes: list[str]
    is_memory: bool = False


def choose(store: Store, start: str) -> Origin | None:
    """The origin of a run that starts "auto", "fresh" or at a path; None for step 0. Rank 0 and the driver only.

    A start that the launch has already gone beyond is not repeated: its own checkpoints win.
    """
    if start != "auto" and not any(e.manifest and e.manifest.launch == store.launch for e in store.listed()):
        return None if start == "fresh" else origin_at(start)
    return or_heritage(heritage_files(store.storage, FOLDER), origin_of(*newest_to_trust(store)))


def or_heritage(files: Sequence[HeritageFile], ours: Origin | None) -> Origin | None:
    """`ours`, or the newest of OpenPCDet's files of a folder if it is of a later epoch.   Raises CheckpointError.

    Epochs and not steps: those depend on the batch size, which each program has cut in its own way.
    """
    whole = [file for file in files if not file.damage]
    if ours is not None and (not whole or ours.manifest is None or whole[0].epoch <= ours.manifest.progress.epoch):
        return ours
    damage = [file.damage for file in files if file.damage]
    if files and not whole:
        raise CheckpointError(
            "none of the .pth files of this folder can be read, and training never starts over silently:\n"
            + "\n".join(f"  {each}" for each in damage)
            + "\nTo start over all the same, use --resume never --overwrite"
        )
    if not whole:
        return None
    newest = whole[0]
    notes = [f"passed over {each}" for each in damage]
    notes.append(f"going on from {newest.name}, after its epoch {newest.epoch}, iteration {newest.step}")
    return Origin(newest.path, None, None, notes)


def newest_to_trust(store: Store) -> tuple[Saved | None, list[tuple[str, str]]]:
    """The newest checkpoint that verifies, and (name, what is wrong) of each newer one, also of one that is gone."""
    newest, passed_over = store.latest_verified()
    return newest, [*vanished(store, newest), *passed_over]


def origin_of(newest: Saved | None, passed_over: list[tuple[str, str]]) -> Origin | None:
    """The origin of a run in whose store `newest_to_trust` found this; a CheckpointError where it must not start."""
    notes = [f"passed over {name}: {reason}" for name, reason in passed_over]
    if newest is not None:
        return Origin(newest.path, newest.name, newest.manifest, notes)
    if passed_over:
        raise CheckpointError(
            "none of the checkpoints of this run can be trusted, and training never starts over silently:\n"
            + "\n".join(f"  {reason}" for _, reason in passed_over)
            + "\nTo start over all the same, use --resume never --overwrite"
        )
    return None


def vanished(store: Store, found: Saved | None) -> list[tuple[str, str]]:
    """The newest checkpoint that the journal tells of, with what is wrong, if nothing is left of it nor of a later one.

    found: the newest that verifies; the keeper of a killed run saves more than its journal tells of.
    Retention never removes that one. Without it a run whose ckpt/ is lost would start over silently.
    """
    storage = store.storage
    records = read_journal(storage, kinds=("checkpoint",))
    saved = [(str(record.get("name")), record.get("step")) for record in records]
    saved = [(name, step) for name, step in saved if NAME.fullmatch(name)]  # what else there may be names none
    if not saved or storage.exists(f"{FOLDER}/{saved[-1][0]}"):
        return []
    name, step = saved[-1]
    if found is not None and isinstance(step, int) and found.manifest.progress.step > step:
        return []
    path = storage.path_of(f"{FOLDER}/{name}")
    return [(name, f"{path}: the journal tells of this checkpoint, but it is gone")]


def origin_at(path: str) -> Origin:
    """The origin that a user's path names: a .pth, a checkpoint folder, or a run folder or its ckpt (the newest)."""
    location = expanded(path, "--resume")
    if "://" not in path:
        path = str(location.absolute())
        if location.is_file() and not (location.name == PAYLOAD and (location.parent / MANIFEST).exists()):
            return Origin(path, None, None, [])
        if location.is_file():
            path = str(location.absolute().parent)
    storage = open_storage(path)
    run_folder = run_folder_of(storage)
    if run_folder is not storage or storage.exists(FOLDER):
        return newest_at(run_folder, path)
    if not storage.exists(MANIFEST) and (found := or_heritage(heritage_files(storage, ""), None)):
        return found
    if not storage.exists(MANIFEST):
        wrong = "this is no checkpoint" if storage.exists("") else "there is no such file or folder"
        raise ResumeError(
            f"{path}: {wrong}; name a .pth file, a checkpoint folder (RUN/ckpt/checkpoint_epoch_3) or a run folder"
        )
    return Origin(path, None, verify_checkpoint(*parent_storage(path)), [])


def run_folder_of(storage: Storage) -> Storage:
    """The run folder whose ckpt this is, if it is one with checkpoints of ours; else the same."""
    is_ckpt = not storage.exists(FOLDER) and any(NAME.fullmatch(name) for name in storage.list(""))
    return parent_storage(storage.path_of(""))[0] if is_ckpt else storage


def newest_at(storage: Storage, path: str) -> Origin:
    """The newest of another run's folder; CheckpointError if nothing there can be trusted."""
    newest, passed_over = newest_verified(storage)
    notes = [f"passed over {name}: {reason}" for name, reason in passed_over]
    ours = Origin(newest.path, None, newest.manifest, notes) if newest else None
    found = or_heritage(heritage_files(storage, FOLDER), ours)
    if found is None:
        raise CheckpointError("\n".join([f"--resume {path}: this run folder holds no checkpoint to trust", *notes]))
    return found


def parent_storage(path: str) -> tuple[Storage, str]:
    """The folder of a checkpoint, and its name there."""
    parent, name = parent_and_name(path)
    return open_storage(parent), name


def compare(manifest: Manifest, new: dict[str, Any], allow_config_change: bool, where: str) -> list[str]:
    """A line for each key that differs from the checkpoint's config; ResumeError if one of FIXED does.

    Phases that begin where the checkpoint was made, or later, have decided nothing in it: they may differ. So may keys
    that there were none of when it was made, where they have their default.
    """
    old, new = (without_later_phases(config, manifest.progress) for config in (manifest.config, new))
    different = [(k, a, b) for k, a, b in config_diff(old, new) if not k.startswith(FREE)]
    different = [(k, a, b) for k, a, b in different if a is not ABSENT or not is_default(Config, k, b)]
    refused = [(k, a, b) for k, a, b in different if k in FIXED and a is not ABSENT]  # one from before the key
    if refused and not allow_config_change:
        raise ResumeError(
            f"{where} was made with another config:\n"
            + "\n".join(f"  {k}: was {a}, now {b} ({FIXED[k]})" for k, a, b in refused)
            + "\nWhat to do: put the old values back; or start a new run (--extra_tag NAME); "
            "or go on under the new ones all the same (--allow-config-change)"
        )
    return [f"config differs from the checkpoint's: {k}: was {a}, now {b}" for k, a, b in different]


def begun_by(origin: Origin, cfg_file: str) -> list[str]:
    """A line if the checkpoint, where it is this folder's own, is of another YAML file. Driver only: it has them."""
    before = origin.manifest.config.get("CFG_FILE") if origin.name is not None and origin.manifest else None
    return other_file(before, cfg_file)


def without_later_phases(config: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The config with only those of its PHASES under which a step was taken before `progress`."""
    optim = config.get("OPTIMIZATION", {})
    epochs_begun = progress.epoch + (progress.cursor > 0)
    begun = [phase for phase in optim.get("PHASES", []) if phase["FROM_EPOCH"] < epochs_begun]
    return {**config, "OPTIMIZATION": {**optim, "PHASES": begun}}


def check_plan(manifest: Manifest, plan: Plan, allow_config_change: bool, where: str) -> bool:
    """True if the data is cut as when the checkpoint was made; ResumeError if not and that was not allowed."""
    old = manifest.world
    now = {
        "num_samples": plan.num_samples,
        "batch_size": plan.batch_size,
        "virtual_workers": plan.virtual_workers,
        "accumulate": plan.accumulate,
        "last": plan.last,
    }
    old = {"last": "keep", **old}  # which it was before there was a choice
    changed = [f"{k}: was {old[k]}, now {v}" for k, v in now.items() if old[k] != v]
    if changed and not allow_config_change:
        raise ResumeError(
            f"{where} was made with other data or another batch:\n"
            + "\n".join(f"  {line}" for line in changed)
            + "\nWhat to do: start a new run (--extra_tag NAME), or go on under the new ones all the same "
            "(--allow-config-change): the sample position is kept and the schedule follows it"
        )
    return not changed


def check_place(progress: Progress, plan: Plan, where: str) -> None:
    """ResumeError if `progress` is no place in the data: no step is left of such an epoch, and it would never end."""
    epoch, cursor, step = dataclasses.astuple(progress)
    if not all(type(number) is int and number >= 0 for number in (epoch, cursor, step)) or plan.taken(cursor) == 0:
        raise ResumeError(
            f"{where}: it says that it was made after {epoch!r:.20} epochs, {cursor!r:.20} samples of the next and "
            f"{step!r:.20} steps, which is no place in a data set of {plan.num_samples} samples. What to do: go on "
            "from another checkpoint (--resume PATH), or start a new run from its weights (--pretrained_model PATH)"
        )


def bring(run: RunState, origin: Origin, allow_config_change: bool) -> list[str]:
    """Bring `run` to its origin; returns what a user should know, a line each."""
    payload = load_origin(origin)
    if origin.manifest is None:
        if "raytrain" in payload:
            notes = restore(run, payload, origin.path)
            check_place(run.progress, run.plan, origin.path)
            return [*notes, "it has no manifest: its config and data could not be compared"]
        return restore_heritage(run, payload, origin.path)
    notes = other_bits(origin.manifest.world, {"num_workers": run.world.size, **run.engine.arithmetic})
    notes += other_hardware(origin.manifest.world.get("hardware", {}), run.hardware)
    same = check_plan(origin.manifest, run.plan, allow_config_change, origin.path)
    notes += restore(run, payload, origin.path)
    if same:
        check_place(run.progress, run.plan, origin.path)
        return notes
    before = run.progress
    run.progress = run.plan.converted(before.epoch, before.cursor)
    return [
        *notes,
        f"another batch or data set: step {before.step} counts as step {run.progress.step} of the new schedule",
    ]


def other_bits(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing by which the run goes on to other bits than it would have. As `Manifest.world` has them."""
    notes = []
    if was.get("engine", now["engine"]) != now["engine"]:
        notes.append(f"engine was {was['engine']}, now {now['engine']}: sums are rounded in another order from here on")
    leaves = was.get("virtual_workers", 1)
    was_exact = was.get("exact", leaves <= 2 and was["num_workers"] == leaves)  # as an older release added
    if was_exact and not now["exact"]:
        notes.append(
            "this run was exact, and is not any more: from here on its bits depend on the number of worker processes. "
            "SCALE.EXACT: true keeps it exact"
        )
    elif now["exact"] and not was_exact and leaves > 1:
        notes.append("this run was not exact up to here; from here on its bits are those of any number of workers")
    elif not now["exact"]:
        for name in ("num_workers", "reduction"):
            if was.get(name, now[name]) != now[name]:
                why = "SCALE.EXACT is false, so sums are rounded in another order from here on"
                notes.append(f"{name} was {was[name]}, now {now[name]}: {why}")
    return notes


def why_not_exact(run: RunState, is_elastic: bool = False) -> list[str]:
    """A line if the run's bits depend on the number of worker processes."""
    if run.engine.is_exact or run.world.virtual_workers == 1:
        return []
    if is_elastic:
        return [
            "SCALE.EXACT is false, and this run is elastic: its bits depend on when the number of worker processes "
            "changes, and so on chance"
        ]
    return [
        f"SCALE.EXACT is false: the bits of this run are those of {run.world.size} worker "
        f"process{'es' if run.world.size > 1 else ''}, and differ in the last places on another number"
    ]


def load_origin(origin: Origin) -> dict[str, Any]:
    """What the checkpoint holds, verified where it has a manifest."""
    if origin.manifest is None:
        return load_weights_file(origin.path)
    return load_payload(*parent_storage(origin.path))


def is_complete(origin: Origin | None, num_epochs: int) -> bool:
    """True if nothing is left to do: all epochs trained, and the last one evaluated."""
    manifest = origin.manifest if origin else None
    return manifest is not None and manifest.progress.epoch >= num_epochs and manifest.metrics is not None


def bring_to_start(run: RunState, store: Store, job: Job, kept: KeeperClient | None) -> tuple[Origin | None, list[str]]:
    """Collective. Bring `run` to where it goes on; rank 0 chooses. Returns the origin, and what a user should know."""
    origin = None
    if run.world.is_first:
        origin = choose(store, job.start)
    origin = run.world.broadcast_object(origin)
    remembered = bring_from_memory(run, kept, origin)
    if remembered is not None:
        if run.progress.cursor == 0 and run.progress.epoch > 0:  # its checkpoint may be there any moment, by the keeper
            run.unevaluated = checkpoint_name(run.progress)
        saved = origin.manifest.source if origin and origin.manifest else {}
        return remembered, [*remembered.notes, *source_notes(saved, run.source)]
    if origin is None:
        if job.pretrained_model is None:
            return None, [*job.notes]
        pretrained = load_pretrained(run.model, job.pretrained_model, job.allow_partial)
        return None, [*job.notes, *pretrained.notes(job.pretrained_model)]
    notes = [*origin.notes]
    if origin.manifest is not None:
        notes += compare(origin.manifest, run.config, job.allow_config_change, origin.path)
        notes += source_notes(origin.manifest.source, run.source)
        notes += job.notes if origin.manifest.launch != job.launch else []
    notes += bring(run, origin, job.allow_config_change)
    if job.pretrained_model is not None:
        notes.append(f"--pretrained_model {job.pretrained_model} is not used: the run resumes from {origin.path}")
    if origin.manifest is not None and origin.manifest.metrics:
        run.metrics = origin.manifest.metrics_with_nan
        if store.is_better(run.metrics, run.best):
            run.best = {"epoch": run.progress.epoch, "step": run.progress.step, "metrics": run.metrics}
    elif origin.name is not None and run.progress.cursor == 0 and run.progress.epoch > 0:
        run.unevaluated = origin.name
    if run.world.is_first and job.start not in ("auto", "fresh"):
        moved = store.supersede(run.progress)
        if moved:
            notes.append(f"newer checkpoints of this run folder are now in ckpt/superseded: {', '.join(moved)}")
    return origin, notes


def bring_from_memory(run: RunState, kept: KeeperClient | None, origin: Origin | None) -> Origin | None:
    """Collective. Bring `run` to the newest state that is kept in memory, if that is newer than `origin`; else None."""
    offers = run.world.all_objects(kept.newest if kept else None)
    newest = max((offer for offer in offers if offer is not None), default=None)
    stored = origin.manifest.progress if origin and origin.manifest else None
    if newest is None or (stored is not None and (newest.epoch, newest.cursor) <= (stored.epoch, stored.cursor)):
        return None
    payload: Any = load_newest(kept) if kept and offers[run.world.rank] == newest else None
    if any(offer != newest for offer in offers):  # some are on a host that has it not
        payload = run.world.broadcast_object(payload, offers.index(newest))
    path = f"the memory of its host, step {newest.step}"
    notes = restore(run, payload, path)
    return Origin(path, None, None, notes, is_memory=True)
