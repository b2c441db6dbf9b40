"""What can be known of a sweep before anything is trained: the metrics that its task gives, and how long a trial is."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from raytrain.config.sections import Config
from raytrain.engine.determinism import torch_put_back
from raytrain.engine.randomness import seed_all
from raytrain.engine.world import World
from raytrain.errors import ConfigError
from raytrain.progress import AT_START
from raytrain.storage.forks import tend_forks
from raytrain.sweep.datasets import are_the_same_for_all, built_and_pickled
from raytrain.sweep.space import objective, workers_of_trial
from raytrain.task import Task, make_task
from raytrain.training.contract import checked_metrics, predictions_of
from raytrain.training.preflight import refuse_sync_bn
from raytrain.training.source import source_of
from raytrain.training.worker import build_datasets, plan_of

MAX_SCORED = 2000  # validation samples of an untrained model; with more the first trial's evaluation tells the metrics


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """steps_per_epoch: of a trial.   metrics: that its evaluations give; None where that would take long to find out

    datasets: for every trial, pickled; None where each is to build its own
    source:   of the task's code, as training/source.py has it
    """

    steps_per_epoch: int
    metrics: tuple[str, ...] | None
    datasets: bytes | None
    source: dict[str, str]


def inspect_task(cfg: Config) -> TaskFacts:
    """Of the sweep `cfg`; ConfigError if its trials could not be compared as it says."""
    _, virtual_workers = workers_of_trial(cfg)
    refuse_sync_bn(cfg)
    tend_forks()
    seed_all(cfg.SEED, "task")
    task = make_task(cfg)
    datasets, for_all = built_and_pickled(task, lambda: build_datasets(task, cfg.SEED))
    metric, _ = objective(cfg)
    if "val" not in datasets:
        raise ConfigError(
            f"a sweep compares its trials by {metric!r} of their evaluations, but {type(task).__name__} has nothing to "
            'evaluate: build_dataset("val") gives None. Give it a validation split'
        )
    plan = plan_of(cfg, len(datasets["train"]), World(virtual_workers=virtual_workers))
    metrics = metrics_given(task, datasets)
    if metrics is not None and metric not in metrics:
        raise ConfigError(
            f"TUNE.METRIC is {metric!r}, which {type(task).__name__} does not give; it gives {', '.join(metrics)}"
        )
    shared = for_all if are_the_same_for_all(cfg.TUNE.SPACE) else None
    return TaskFacts(plan.steps_per_epoch, metrics, shared, source_of(cfg.TASK))


def metrics_given(task: Task, datasets: dict[str, Any]) -> tuple[str, ...] | None:
    """The names that an evaluation gives: of an untrained model, on the CPU."""
    val = datasets["val"]
    if not task.has_predict():
        return ("loss",)
    if len(val) > MAX_SCORED:
        return None
    with torch_put_back(), torch.no_grad():
        torch.set_num_threads(1)
        model = task.build_model(datasets["train"]).eval()
        predictions: list[Any] = []
        task.take_progress(AT_START)
        for first in range(0, len(val), 32):
            ids = range(first, min(first + 32, len(val)))
            batch = task.to_device(task.collate([val[i] for i in ids]), torch.device("cpu"))
            predictions += predictions_of(task, model, batch, len(ids))
        return tuple(checked_metrics(task.score(predictions, val), task))
