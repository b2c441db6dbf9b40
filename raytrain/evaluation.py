"""One checkpoint, evaluated by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os

import torch

from raytrain import loop
from raytrain.config import Config, load_config, with_overrides
from raytrain.errors import CheckpointError, TaskError
from raytrain.failure import explains_itself, failure_of, keep_traceback
from raytrain.feed import Feed
from raytrain.launch import as_seen
from raytrain.progress import Progress
from raytrain.randomness import seed_all
from raytrain.records import strict
from raytrain.resume import load_origin, origin_at
from raytrain.start import run_dir_of
from raytrain.state import build_run, load_model_state
from raytrain.storage import open_storage
from raytrain.store import Store
from raytrain.task import make_task
from raytrain.worker import build_datasets, device_here, plan_of, prepare_torch, torch_put_back
from raytrain.world import World


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.   folder: where metrics.json (and predictions.pt) lie"""

    metrics: dict[str, float]
    checkpoint: str
    folder: str


def evaluate(
    cfg: Config | str | os.PathLike[str],
    checkpoint: str | None = None,
    *,
    eval_tag: str = "default",
    batch_size: int | None = None,
    save_predictions: bool = False,
) -> Evaluation:
    """Evaluate a checkpoint on the validation split, in this process.

    checkpoint: a path as for --resume; None takes the run folder's best one, else its newest.
    Raises RaytrainError.
    """
    if not isinstance(cfg, Config):
        cfg = load_config(cfg)
    if batch_size is not None:
        cfg = with_overrides(cfg, ["OPTIMIZATION.BATCH_SIZE_PER_GPU", str(batch_size)])
    run_dir = run_dir_of(cfg)
    try:
        with torch_put_back():
            return _evaluated(cfg, run_dir, checkpoint, eval_tag, save_predictions)
    except Exception as error:
        if explains_itself(error):
            raise
        raise as_seen(failure_of(error, 0, {"what": "The evaluation"}, keep_traceback(error, run_dir))) from error


def _evaluated(cfg: Config, run_dir: str, checkpoint: str | None, eval_tag: str, save_predictions: bool) -> Evaluation:
    storage = open_storage(run_dir)
    if checkpoint is None:
        store = Store(storage, cfg.CHECKPOINT, "")
        found = store.best() or store.latest_verified()[0]
        if found is None:
            raise CheckpointError(f"{storage.path_of('')} holds no checkpoint to evaluate; name one with --ckpt")
        checkpoint = found.path
    seed_all(cfg.SEED, "task")
    task = make_task(cfg)
    datasets = build_datasets(task, cfg.SEED)
    if "val" not in datasets:
        raise TaskError(f"{cfg.TASK}: build_dataset('val') gives None, so there is nothing to evaluate on")
    world = World(device=device_here(cfg))
    prepare_torch(cfg, world.device)
    run = build_run(cfg, task, datasets["train"], plan_of(cfg, len(datasets["train"]), world), world)
    payload = load_origin(origin_at(checkpoint))
    load_model_state(run.model, payload["model_state"], checkpoint)
    epoch = int(payload.get("epoch", 0))
    run.progress = Progress(epoch)
    trained = dataclasses.replace(run.plan, num_epochs=epoch)  # nothing is left to train: the stream is validation only
    channels_last = cfg.OPTIMIZATION.CHANNELS_LAST
    feed = Feed(task, datasets, trained, world, cfg.LOADER, cfg.SEED, lambda epoch: False, channels_last)
    with contextlib.closing(feed):
        feed.start(run.progress, evaluate_first=True)
        metrics, predictions = loop.evaluate(run, task, feed)
    name = f"eval/epoch_{epoch}/val/{eval_tag}"
    storage.write_bytes(f"{name}/metrics.json", json.dumps(strict(metrics), indent=1).encode() + b"\n")
    if save_predictions:
        buffer = io.BytesIO()
        torch.save(predictions, buffer)
        storage.write_bytes(f"{name}/predictions.pt", buffer.getvalue())
    return Evaluation(metrics, checkpoint, storage.path_of(name))
