"""The training loop: train_model > train_one_epoch > train_step.

Torch only: it knows neither Ray nor files nor a terminal, and runs the same under plain pytest,
in one process, and on a cluster. Whatever changes a weight is in train_step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from raytrain.data.feed import Feed, Step
from raytrain.engine.state import RunState
from raytrain.engine.terms import Key, Sum
from raytrain.task import Task
from raytrain.training.contract import Part, part_of
from raytrain.training.recorder import Recorder, Taken
from raytrain.training.validate import evaluate, rehearse


def train_model(run: RunState, task: Task, feed: Feed, recorder: Recorder) -> bool:
    """Collective. Train until all epochs are done; False if stopped before. All that was begun to be saved is saved."""
    with recorder.settled():
        # The run may have ended between saving an epoch and evaluating it.
        if run.unevaluated is not None and not recorder.evaluated(evaluate(run, task, feed)):
            return False
        while not run.plan.finished(run.progress):
            is_whole = train_one_epoch(run, task, feed, recorder)
            evaluates = feed.evaluates_after(run.progress.epoch)
            recorder.epoch_done(is_whole, evaluates)
            if not is_whole or (evaluates and not recorder.evaluated(evaluate(run, task, feed))):
                return False
    return True


def train_one_epoch(run: RunState, task: Task, feed: Feed, recorder: Recorder) -> bool:
    """Collective. Train what is left of this epoch; False if a stop was granted on the way."""
    run.mode.begin()
    for step in feed.epoch_steps(run.progress):
        taken = train_step(run, task, feed, step, recorder.wishes, recorder.terms)
        run.progress = run.plan.advanced(run.progress, step.consumed)
        if not recorder.stepped(step, taken):  # journal, bad step, memory, checkpoint where due
            return False
    return True


def train_step(
    run: RunState,
    task: Task,
    feed: Feed,
    step: Step,
    wishes: Callable[[], Sequence[bool]],
    terms: Callable[[Mapping[int, Sequence[Part]]], Sequence[Mapping[Key, Sum]] | None],
) -> Taken:
    """Collective. One optimizer step on the micro-batches of every virtual worker.

    wishes: asked as late as can be, so that a signal in mid-step stops the run after that very step
    terms:  what is to be recorded of the micro-batches beside the loss; None where no record is due
    """
    at, parts = run.progress.step, dict[int, list[Part]]()
    run.engine.begin_step(at)
    for v, micro_batches in step.micro_batches.items():
        with run.engine.virtual_worker(len(micro_batches)):
            for i, key in enumerate(micro_batches):
                batch = feed.fetch(key)
                if run.compilation is not None:
                    run.compilation.try_out(batch, partial(rehearse, run, task))
                run.randomness.seed(run.seed, "step", at, v, i)
                with run.engine.precision.autocast():
                    returned = task.model_func(run.model, batch)
                part = part_of(returned, len(key.ids) / step.consumed, task)  # the mean, as of one large batch
                run.engine.backward(part.loss, part.share, is_last=(v, i) == step.last)
                parts.setdefault(v, []).append(part)
    return Taken(run.engine.step(run.schedule.at(at), wishes(), terms(parts)), parts)
