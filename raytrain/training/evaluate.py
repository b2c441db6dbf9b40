"""`raytrain eval` and `raytrain view`: one checkpoint, evaluated by itself, and looked at."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Subset

from raytrain.config.load import config_diff, load_config, with_overrides
from raytrain.config.sections import Config, Eval, stays_below
from raytrain.data.feed import Feed
from raytrain.engine.determinism import device_here, prepare_torch, torch_put_back
from raytrain.engine.own_state import OwnState
from raytrain.engine.pretrained import load_pretrained
from raytrain.engine.randomness import seed_all
from raytrain.engine.state import RunState, build_run, compile_model, load_heritage_model, load_model_state
from raytrain.engine.world import World
from raytrain.errors import CheckpointError, ConfigError, ResumeError, TaskError, explained
from raytrain.journal.records import strict
from raytrain.journal.run_folder import run_dir_of
from raytrain.progress import Progress
from raytrain.storage.forks import tend_forks
from raytrain.storage.heritage_files import heritage_files
from raytrain.storage.lock import refuse_links
from raytrain.storage.paths import expanded
from raytrain.storage.storage import Storage, open_storage
from raytrain.storage.store import FOLDER, Store, listed
from raytrain.task import Task, make_task
from raytrain.training import validate
from raytrain.training.contract import pictures_of
from raytrain.training.pictures import why_not_drawn, write_pictures
from raytrain.training.resume import Origin, begun_by, load_origin, or_heritage, origin_at, run_folder_of
from raytrain.training.sameness import arrays_of, compare_with_checkpoint, names_of, record_of
from raytrain.training.source import source_notes, source_of
from raytrain.training.worker import build_datasets, plan_of

# What an evaluation follows from, beside the weights; a task may draw its split by SEED.
EVALUATED = ("TASK", "SEED", "CLASS_NAMES", "DATA_CONFIG", "MODEL")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    folder:   where metrics.json lies (and predictions.pt)
    infer_time: how long a batch took, in words
    pictures: the folder of its pictures, if there are any
    warning:  why there are none, where they were asked for
    notes:    how config and code differ from those that the checkpoint was made with; what the task says of it; what
              is to be known of the data
    """

    metrics: dict[str, float]
    checkpoint: str
    folder: str
    infer_time: str
    pictures: str | None = None
    warning: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class View:
    """Paths of pictures, and of the checkpoint whose predictions they show, if they show any; notes as Evaluation's."""

    pictures: list[str]
    checkpoint: str | None
    notes: list[str] = dataclasses.field(default_factory=list)


def evaluate(
    cfg: Config | str | os.PathLike[str],
    ckpt: str | os.PathLike[str] | None = None,
    *,
    eval_tag: str = "default",
    batch_size: int | None = None,
    save_to_file: bool = False,
    pretrained_model: str | os.PathLike[str] | None = None,
    allow_partial: bool = False,
) -> Evaluation:
    """Evaluate a checkpoint on the validation split, in this process.

    ckpt: a path as for --resume; None takes the run folder's best one, else its newest
    pretrained_model: a file of weights as for training, over those of `ckpt`; with no `ckpt` they alone are evaluated
    save_to_file: whether the predictions are written too.   Raises RaytrainError.
    """
    if not isinstance(cfg, Config):
        cfg = load_config(cfg)
    if not stays_below(eval_tag):
        raise ConfigError(f"--eval_tag is {eval_tag!r}, but it must be a folder name: neither absolute nor with `..`")
    if batch_size is not None:
        cfg = with_overrides(cfg, ["OPTIMIZATION.BATCH_SIZE_PER_GPU", str(batch_size)])
    run_dir = run_dir_of(cfg)
    refuse_links(open_storage(run_dir))
    with _explained("The evaluation", run_dir):
        weights = None if pretrained_model is None else os.fspath(pretrained_model)
        return _evaluated(cfg, run_dir, ckpt, eval_tag, save_to_file, weights, allow_partial)


def view(
    cfg: Config | str | os.PathLike[str], ckpt: str | os.PathLike[str] | None = None, *, count: int | None = None
) -> View:
    """Pictures of the first samples of the validation split, in this process.

    With what a checkpoint predicts, where one is named or the run folder has one; of the data alone otherwise.
    count: how many; None takes EVAL.PICTURES.   Raises RaytrainError.
    """
    if not isinstance(cfg, Config):
        cfg = load_config(cfg)
    cfg = with_overrides(cfg, ["LOADER.WORKERS", "0"])  # a few samples come sooner than loader workers
    run_dir = run_dir_of(cfg)
    refuse_links(open_storage(run_dir))
    with _explained("Drawing", run_dir):
        return _viewed(cfg, run_dir, ckpt, count or cfg.EVAL.PICTURES or Eval().PICTURES)


@contextlib.contextmanager
def _explained(what: str, run_dir: str) -> Iterator[None]:
    """torch is afterwards set as it was, and a failure is told as one of training is."""
    tend_forks()
    with explained(what, run_dir), torch_put_back():
        yield


def _evaluated(
    cfg: Config,
    run_dir: str,
    ckpt: str | os.PathLike[str] | None,
    eval_tag: str,
    save_to_file: bool,
    weights: str | None,
    allow_partial: bool,
) -> Evaluation:
    storage = open_storage(run_dir)
    origin = None if ckpt is None and weights is not None else evaluated_origin(cfg, storage, ckpt)
    if origin is None and weights is None:
        raise CheckpointError(f"{storage.path_of('')} holds no checkpoint to evaluate; name one with --ckpt")
    notes = [*origin.notes, *evaluation_differences(origin, cfg)] if origin is not None else []
    seed_all(cfg.SEED, "task")
    task = make_task(cfg)
    datasets = validated_datasets(cfg, task)
    run, others = restored(cfg, task, datasets, origin)
    if weights is not None:
        others += load_pretrained(run.model, weights, allow_partial).notes(weights)
    with contextlib.closing(validation_feed(cfg, task, run, datasets)) as feed:
        batch_s: list[float] = []
        validation = validate.evaluate(run, task, feed, batch_s)
    metrics, predictions = validation.metrics, validation.predictions
    name = f"eval/epoch_{run.progress.epoch}/val/{eval_tag}"
    storage.write_bytes(f"{name}/metrics.json", json.dumps(strict(metrics), indent=1).encode() + b"\n")
    if save_to_file:
        buffer = io.BytesIO()
        torch.save(predictions, buffer)
        storage.write_bytes(f"{name}/predictions.pt", buffer.getvalue())
    notes = [*notes, *others, *feed.notes, *task.take_notes()]
    path = " and ".join(filter(None, [origin.path if origin else None, weights]))
    infer_time = validate.infer_time(batch_s, cfg.OPTIMIZATION.BATCH_SIZE_PER_GPU)
    evaluation = Evaluation(metrics, path, storage.path_of(name), infer_time, notes=notes)
    if not (task.has_pictures() and cfg.EVAL.PICTURES):
        return evaluation
    try:
        pictures = pictures_of(task, predictions, datasets["val"], cfg.EVAL.PICTURES, cfg.SEED, run.progress.epoch)
        drawn = write_pictures(pictures, storage, f"{name}/pictures")
    except Exception as error:  # the metrics are what was asked for, and they are there
        return dataclasses.replace(evaluation, warning=why_not_drawn(error, task, run_dir))
    return dataclasses.replace(evaluation, pictures=storage.path_of(f"{name}/pictures") if drawn else None)


def _viewed(cfg: Config, run_dir: str, ckpt: str | os.PathLike[str] | None, count: int) -> View:
    seed_all(cfg.SEED, "task")
    task = make_task(cfg)
    if not task.has_pictures():
        raise TaskError(
            f"{cfg.TASK} draws no pictures; write {type(task).__name__}.pictures(predictions, dataset, count): "
            "a generator of (name, PNG bytes) of the first `count` samples"
        )
    datasets, storage = validated_datasets(cfg, task), open_storage(run_dir)
    origin = evaluated_origin(cfg, storage, ckpt)
    epoch, name, predictions = 0, "view/data", []
    notes: list[str] = []
    if origin is not None and task.has_predict():
        notes = evaluation_differences(origin, cfg)
        run, others = restored(cfg, task, datasets, origin)
        epoch, name = run.progress.epoch, f"view/epoch_{run.progress.epoch}"
        first = Subset(datasets["val"], range(min(count, len(datasets["val"]))))
        with contextlib.closing(validation_feed(cfg, task, run, {**datasets, "val": first})) as feed:
            predictions = [prediction for _, prediction in validate.predict_split(run, task, feed)]
        notes += [*others, *feed.notes]
    pictures = pictures_of(task, predictions, datasets["val"], count, cfg.SEED, epoch)
    names = write_pictures(pictures, storage, name)
    paths = [storage.path_of(f"{name}/{each}.png") for each in names]
    return View(paths, origin.path if origin and predictions else None, [*notes, *task.take_notes()])


def evaluated_origin(cfg: Config, storage: Storage, ckpt: str | os.PathLike[str] | None) -> Origin | None:
    """The checkpoint that a user's path names; else a run folder's best one, else its newest that can be trusted."""
    if ckpt is not None:
        return origin_at(os.fspath(ckpt))
    store = Store(storage, cfg.CHECKPOINT, "")
    saved = store.best() or store.latest_verified()[0]
    if saved is None:
        return or_heritage(heritage_files(storage, FOLDER), None)
    return Origin(saved.path, saved.name, saved.manifest, [])


def evaluation_differences(origin: Origin, cfg: Config) -> list[str]:
    """A line for each thing that decides an evaluation and is not as when the checkpoint was made.

    ResumeError if the run folder's own is another task's; one that the user has named may be.
    """
    if origin.manifest is None:
        return []
    old, now = origin.manifest.config, cfg.to_tree()
    if origin.name is not None and old.get("TASK") != cfg.TASK:
        raise ResumeError(
            f"{origin.path} was made by TASK {old.get('TASK')}, and this config has {cfg.TASK}. What to do: give the "
            "config of that run, or the folder of this one's (--extra_tag NAME); or name the checkpoint to have it "
            "evaluated by this task all the same (--ckpt PATH)"
            + "".join(f"\nnote: {note}" for note in begun_by(origin, cfg.CFG_FILE))
        )
    different = [(k, a, b) for k, a, b in config_diff(old, now) if k.split(".")[0] in EVALUATED]
    lines = [f"config differs from the checkpoint's: {k}: was {a}, now {b}" for k, a, b in different]
    return [*lines, *source_notes(origin.manifest.source, source_of(cfg.TASK)), *begun_by(origin, cfg.CFG_FILE)]


def validated_datasets(cfg: Config, task: Task) -> dict[str, Any]:
    """The data sets by split; a TaskError where there is none for validation."""
    datasets = build_datasets(task, cfg.SEED)
    if "val" not in datasets:
        raise TaskError(f"{cfg.TASK}: build_dataset('val') gives None, so there is nothing to evaluate on")
    return datasets


def checkpoints_in(cfg: Config, folder: str | None, start_epoch: int) -> list[str]:
    """Paths of all checkpoints of a folder, the oldest first; of the config's run folder where none is named.

    folder: a run folder, its ckpt, or one with .pth files.   start_epoch: of which epoch they are at least
    Raises CheckpointError where there is none.
    """
    path = run_dir_of(cfg) if folder is None else str(expanded(folder, "--ckpt_dir").absolute())
    storage = run_folder_of(open_storage(path))
    within = FOLDER if storage.exists(FOLDER) else ""
    ours = [(e.manifest.progress.epoch, e.manifest.progress.step, e.name) for e in listed(storage) if e.manifest]
    theirs = [(file.epoch, file.step, file.name) for file in heritage_files(storage, within) if not file.damage]
    found = [
        storage.path_of(f"{within}/{name}".lstrip("/"))
        for epoch, _, name in sorted(ours + theirs)
        if epoch >= start_epoch
    ]
    if not found:
        raise CheckpointError(f"{storage.path_of('')} holds no checkpoint of epoch {start_epoch} or later to evaluate")
    return found


def restored(cfg: Config, task: Task, datasets: dict[str, Any], origin: Origin | None) -> tuple[RunState, list[str]]:
    """A run on this process's device with a checkpoint's weights, at its epoch; and what is not as it was then.

    Without a checkpoint it is as it was built.
    """
    world = World(device=device_here(cfg))
    prepare_torch(cfg, world.device)
    plan = plan_of(with_overrides(cfg, ["LOADER.LAST", "keep"]), len(datasets["train"]), world)  # nothing is trained
    run = build_run(cfg, task, datasets["train"], plan, world)
    compile_model(run, cfg.OPTIMIZATION)
    if origin is None:
        return run, []
    built = {**record_of(datasets), "names": names_of(task, datasets), "arrays": arrays_of(task, run.model, datasets)}
    notes = compare_with_checkpoint(origin.manifest.world.get("built", {}), built) if origin.manifest else []
    payload = load_origin(origin)
    if "raytrain" in payload:
        load_model_state(run.model, payload["model_state"], origin.path)
    else:
        notes += load_heritage_model(run.model, payload, origin.path)[0]
    notes += OwnState.of(task, datasets).load(payload.get("raytrain", {}).get("own", {}), origin.path)
    run.progress = progress_of(payload)
    return run, notes


def progress_of(payload: dict[str, Any]) -> Progress:
    """Where a checkpoint was made, ours or OpenPCDet's."""
    made = payload.get("raytrain", {}).get("progress")
    return Progress(**made) if made else Progress(int(payload.get("epoch") or 0), 0, int(payload.get("it") or 0))


def validation_feed(cfg: Config, task: Task, run: RunState, datasets: dict[str, Any]) -> Feed:
    """The validation split's batches, and nothing after them."""
    channels_last = cfg.OPTIMIZATION.CHANNELS_LAST
    feed = Feed(task, datasets, run.plan, run.world, cfg.LOADER, cfg.SEED, lambda epoch: False, channels_last)
    feed.start(run.progress, evaluate_first=True, trains=False)
    return feed
