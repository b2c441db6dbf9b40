"""A pass over the validation split while a run trains, or for `raytrain eval`: predictions and metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from raytrain.data.feed import Feed
from raytrain.data.loader import BatchKey
from raytrain.engine.attributes import Look, Saved, changes, look, parts_of
from raytrain.engine.kept import model_kept
from raytrain.engine.own_state import datasets_in
from raytrain.engine.randomness import Randomness
from raytrain.engine.state import RunState
from raytrain.engine.terms import refuse_mixture
from raytrain.errors import TaskError, listed, users_traceback
from raytrain.task import Task
from raytrain.training.contract import checked_metrics, loss_of, part_of, predictions_of


def rehearse(run: RunState, task: Task, batch: Any) -> None:
    """What a step or an evaluation computes of a batch, thrown away: no gradient is added to any."""
    with run.engine.buffers.parameters_kept(), run.engine.precision.autocast():
        if not run.model.training and task.has_predict():
            task.predict(run.model, batch)
            return
        loss = loss_of(task.model_func(run.model, batch), task)
    if run.model.training:
        torch.autograd.grad(loss, run.engine.trainable, allow_unused=True)


@contextlib.contextmanager
def gradients_as_wished(task: Task) -> Iterator[None]:
    """Evaluation records no gradients unless the task needs them; one that does not say so is told what to write."""
    with torch.set_grad_enabled(task.eval_needs_grad):
        try:
            yield
        except RuntimeError as error:
            if task.eval_needs_grad or "does not require grad" not in str(error):
                raise
            raise TaskError(
                f"evaluation records no gradients, and {type(task).__name__} asks for one: {error}. "
                f"Write `eval_needs_grad = True` in class {type(task).__name__}\n\n{users_traceback(error)}"
            ) from error


def predict_split(run: RunState, task: Task, feed: Feed, batch_s: list[float] | None = None) -> list[tuple[int, Any]]:
    """(position in the data set, prediction) of each sample of this process's part of the validation split.

    Where the task has no predict: (position, (loss, samples or weight)) of each batch.
    batch_s: gets the seconds from each batch, on the device, to what is predicted of it, on the host
    """
    run.model.eval()
    predictions: list[tuple[int, Any]] = []
    weighted: set[bool] = set()
    for key in feed.validation_keys(run.progress):
        with torch.no_grad():
            batch = feed.fetch(key)
        if run.compilation is not None:
            with gradients_as_wished(task):
                run.compilation.try_out(batch, partial(rehearse, run, task))
        run.randomness.seed(run.seed, "evaluate", key.epoch, key.ids[0])
        if batch_s is not None and run.world.device.type == "cuda":
            torch.cuda.synchronize(run.world.device)  # or what came before would count
        began_s = time.perf_counter()
        with gradients_as_wished(task), run.engine.precision.autocast():
            if task.has_predict():
                predictions.extend(zip(key.ids, predictions_of(task, run.model, batch, len(key.ids)), strict=True))
            else:
                part = part_of(task.model_func(run.model, batch), len(key.ids), task)
                predictions.append((key.ids[0], (part.loss.item(), float(part.share))))
                weighted.add(torch.is_tensor(part.share))
                refuse_mixture(weighted)
        if batch_s is not None:
            batch_s.append(time.perf_counter() - began_s)
    return predictions


def infer_time(batch_s: list[float], size: int) -> str:
    """The mean of what `predict_split` says of each batch, in words; without the first tenth, which warms up.

    size: samples of a batch; the last may have fewer, and is left out where there are others
    """
    warm_up = min(len(batch_s) - 1, math.ceil(len(batch_s) / 10))
    timed = batch_s[warm_up:-1] or batch_s[warm_up:]
    return f"{1e3 * sum(timed) / len(timed):.3g} ms a batch of {size}: the mean of {len(timed)}, {warm_up} before it"


@dataclasses.dataclass(frozen=True)
class Validation:
    """What a pass over the validation split came to.

    metrics:     the same on every rank and for any number of them
    predictions: on rank 0, in the data set's order; of each batch (loss, samples or weight) where there is no predict
    """

    metrics: dict[str, float]
    predictions: list[Any]
    seconds: float


def evaluate(run: RunState, task: Task, feed: Feed, batch_s: list[float] | None = None) -> Validation:
    """Collective. A pass over the validation split; the model is then what it was, whatever the task did to it.

    Training would go on with another one else: no checkpoint holds that, and score is called on rank 0 alone.
    batch_s: as of predict_split
    """
    began_s = time.perf_counter()
    name = type(task).__name__
    with model_kept(run.model) as changed:
        before = look_into_task(run, task, feed) if run.world.size > 1 else {}
        predictions = predict_split(run, task, feed, batch_s)
        collected = changes(before, look_into_task(run, task, feed), Saved({}, {})) if before else []
        metrics, in_order = scored(run, task, feed, predictions)
    if collected:
        task.note(
            f"{listed([attribute.partition(' ')[0] for attribute in collected])} changed while {name}.predict ran: "
            f"each of the {run.world.size} workers predicts a part of the validation split, and score, which is called "
            "on rank 0 alone, finds what is of its own part. Give score what it needs in what predict returns"
        )
    if changed:
        task.note(
            f"evaluation changed {listed(changed)} of the model, which was then put back: training goes on with what "
            f"it had before. What {name}.predict and {name}.score do to the model holds within an evaluation alone"
        )
    return Validation(metrics, in_order, time.perf_counter() - began_s)


def look_into_task(run: RunState, task: Task, feed: Feed) -> Look:
    """What the task holds besides model and data sets, those behind them too: set_epoch changes these, as it will."""
    datasets = [each for split, whole in feed.datasets.items() for _, each in datasets_in(whole, split)]
    known: list[Any] = [*parts_of(run.model), *datasets]
    return look({type(task).__name__: task}, known)


def scored(
    run: RunState, task: Task, feed: Feed, predictions: list[tuple[int, Any]]
) -> tuple[dict[str, float], list[Any]]:
    """Collective. The metrics of what all ranks predicted; and on rank 0 the predictions, in order."""
    feed.current = BatchKey("val", run.progress.epoch, ())  # what fails from here on is no batch's fault
    metrics: dict[str, float] = {}
    in_order: list[Any] = []
    run.engine.beat("reduce")
    gathered = run.world.gather_objects(predictions)
    if run.world.is_first:
        run.engine.beat("eval")
        in_order = [value for _, value in sorted((pair for part in gathered for pair in part), key=lambda p: p[0])]
        if task.has_predict():
            Randomness(dataset=feed.datasets["val"], task=task).seed(run.seed, "score", run.progress.epoch)
            with gradients_as_wished(task):  # a list of its own, which it may sort: pictures are drawn of ours
                metrics = checked_metrics(task.score(list(in_order), feed.datasets["val"]), task)
        else:
            counted = [(loss, weight) for loss, weight in in_order if weight]  # the mean of nothing is NaN
            total = sum(weight for _, weight in counted)
            metrics = {"loss": sum(loss * weight for loss, weight in counted) / total if total else math.nan}
    run.engine.beat("reduce")
    return run.world.broadcast_object(metrics), in_order
