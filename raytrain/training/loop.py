"""The training loop: train_model > train_one_epoch > train_step, and evaluate.

Torch only: it knows neither Ray nor files nor a terminal, and runs the same under plain pytest,
in one process, and on a cluster. Whatever changes a weight is in train_step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, Protocol

from raytrain.data.feed import Feed, Step
from raytrain.engine.engine import Stepped
from raytrain.engine.guard import LATE_STEPS
from raytrain.engine.randomness import seed_all
from raytrain.engine.state import RunState
from raytrain.errors import DivergedError, RaytrainError
from raytrain.journal.journal import Journal
from raytrain.keeper.checkpointer import Pending, Saves
from raytrain.keeper.heartbeat import BACKWARD, CHECKPOINT, DATA, FORWARD, REDUCE, REST
from raytrain.progress import Progress
from raytrain.storage.store import checkpoint_name
from raytrain.task import ModelReturn, Task
from raytrain.training.bad_steps import answer, suspects
from raytrain.training.contract import loss_of, mean_of
from raytrain.training.validate import evaluate, rehearse


class Control(Protocol):
    """The outside: what it wants of the loop, and what it is told."""

    def stop_wished(self) -> bool: ...
    def now(self) -> float: ...
    def goes_on(self, progress: Progress, metrics: dict[str, float]) -> bool: ...
    def saved(self, save: Pending | None, metrics: dict[str, float]) -> None: ...


def train_model(run: RunState, task: Task, feed: Feed, saves: Saves, journal: Journal, control: Control) -> bool:
    """Collective. Train until all epochs are done; False if stopped before. All that was begun to be saved is saved."""
    try:
        done = train_epochs(run, task, feed, saves, journal, control)
    except BaseException:
        run.pulse.phase(CHECKPOINT)
        with contextlib.suppress(RaytrainError):  # the failure above is the one to tell
            tell_saved(saves, journal, wait=True)
        run.pulse.phase(REST)
        raise
    tell_saved(saves, journal, wait=True)
    run.pulse.phase(REST)
    return done


def train_epochs(run: RunState, task: Task, feed: Feed, saves: Saves, journal: Journal, control: Control) -> bool:
    """Collective. Train and evaluate what is left of the run; False if stopped on the way."""
    stopped = False
    run.pulse.phase(DATA)
    feed.start(run.progress, evaluate_first=run.unevaluated is not None)
    if run.unevaluated is not None:  # the run ended between saving an epoch and evaluating it
        finish_evaluation(run, task, feed, saves, journal, control, run.unevaluated)
        control.saved(Pending.of_old(run.progress), run.metrics)
        stopped = not goes_on(run, control) and not run.plan.finished(run.progress)
    while not stopped and not run.plan.finished(run.progress):
        goes_on_training, save_wished = train_one_epoch(run, task, feed, saves, journal, control)
        stopped = not goes_on_training
        evaluates = feed.evaluate_after(run.progress.epoch)
        finished = run.plan.finished(run.progress)
        save = None
        due = stopped or save_wished or evaluates or finished
        due = due or saves.store.progress_due(run.progress, epoch_done=True)
        if not due and saves.after_epoch(run):
            journal.hand_over()
        if due:  # before the evaluation: whatever happens in there, the epoch is not trained again
            save = save_checkpoint(run, saves, journal, control, metrics=None if evaluates else {})
        if evaluates and not stopped:
            finish_evaluation(run, task, feed, saves, journal, control, save.name if save else None)
        if due:
            control.saved(save, run.metrics if evaluates and not stopped else {})
        if evaluates and not stopped:
            stopped = not goes_on(run, control) and not finished
    return not stopped


def goes_on(run: RunState, control: Control) -> bool:
    """Collective. Whether the run is to go on after an evaluation, as rank 0 is told; its state is saved."""
    run.pulse.phase(REST)  # the answer may take its time
    return bool(run.world.broadcast_object(run.world.is_first and control.goes_on(run.progress, run.metrics)))


def train_one_epoch(
    run: RunState, task: Task, feed: Feed, saves: Saves, journal: Journal, control: Control
) -> tuple[bool, bool]:
    """Collective. Train what is left of this epoch; False if stopped on the way, and whether its end is to be saved."""
    run.model.train()

    def wishes() -> tuple[bool, bool]:
        return control.stop_wished(), run.world.is_first and saves.time_due(control.now())

    run.notes += untrained(run)
    taken: deque[Step] = deque(maxlen=LATE_STEPS + 1)
    save_granted = False
    step_start = time.perf_counter()
    for step in feed.epoch_steps(run.progress):
        began = run.progress
        stepped, returns = train_step(run, task, feed, step, wishes)
        taken.append(step)
        run.pulse.phase(CHECKPOINT)
        write_notes(run, task, journal)
        run.progress = run.plan.advanced(began, step.consumed)
        step_end, data_s = time.perf_counter(), feed.take_wait_s()
        if journal.wants(run.progress.step, began.step % run.plan.steps_per_epoch, run.plan.steps_per_epoch):
            settings = run.schedule.at(began.step)
            journal.step(
                step=run.progress.step,
                epoch=began.epoch,
                iteration=began.step % run.plan.steps_per_epoch,
                loss=stepped.loss,
                grad_norm=stepped.grad_norm,
                lr=settings.lr,
                momentum=settings.momentum,
                terms=mean_of(returns, "tb_dict", task),
                disp=mean_of(returns, "disp_dict", task),
                samples=step.consumed,
                data_s=data_s,
                step_s=step_end - step_start,
            )
        if stepped.trouble is not None:
            why_end = answer(run, journal, stepped.trouble, suspects(stepped.trouble, taken, returns))
            if why_end is not None:
                run.progress = began if run.engine.guard.takes_again(stepped.trouble) else run.progress
                end_badly(run, saves, journal, control, why_end)
        step_start = step_end
        if saves.after_step(run):
            journal.hand_over()  # what a run that goes on from that memory would not measure again
        tell_saved(saves, journal)
        tell_stragglers(run, journal)
        stop_granted, save_granted = stepped.wishes
        if stop_granted:
            return False, False
        due = save_granted or saves.store.progress_due(run.progress, epoch_done=False)
        if due and run.progress.epoch == began.epoch:
            control.saved(save_checkpoint(run, saves, journal, control, may_be_replaced=True), {})
            step_start, save_granted = time.perf_counter(), False
    return True, save_granted


def train_step(
    run: RunState, task: Task, feed: Feed, step: Step, wishes: Callable[[], Sequence[bool]]
) -> tuple[Stepped, list[ModelReturn]]:
    """Collective. One optimizer step on the micro-batches of every virtual worker.

    wishes: asked as late as can be, so that a signal in mid-step stops the run after that very step
    """
    at = run.progress.step
    returns = []
    run.pulse.step(at + 1)
    if run.engine.guard.anchor_due(at):
        run.engine.wait_for_readers()
        run.engine.guard.drop_anchor(at, run.engine.living())
    run.engine.zero_grad()
    last = max(step.micro_batches), len(step.micro_batches[max(step.micro_batches)]) - 1
    for v, keys in step.micro_batches.items():
        share = 1.0 / (len(keys) * run.plan.virtual_workers)
        with run.engine.virtual_worker():
            for i, key in enumerate(keys):
                run.pulse.phase(DATA)
                batch = feed.fetch(key)
                run.pulse.phase(FORWARD)
                if run.compilation is not None:
                    run.compilation.try_out(batch, partial(rehearse, run, task))
                seed_all(run.seed, "step", at, v, i)
                with run.engine.precision.autocast():
                    returned = task.model_func(run.model, batch)
                run.pulse.phase(BACKWARD)
                run.engine.backward(loss_of(returned, task), share, is_last=(v, i) == last)
                returns.append(returned)
    run.pulse.phase(REDUCE)
    stepped = run.engine.step(run.schedule.at(at), wishes())
    return stepped, returns


def end_badly(run: RunState, saves: Saves, journal: Journal, control: Control, why_end: str) -> NoReturn:
    """Collective. Save the state, in which no bad step has left anything, and raise what ends the run."""
    name = checkpoint_name(run.progress)
    trained = run.progress.step > 0 and int(run.engine.guard.in_a_row) < run.plan.total_steps
    missing = trained and run.world.is_first and name not in [entry.name for entry in saves.store.listed()]
    if run.world.broadcast_object(missing):
        control.saved(save_checkpoint(run, saves, journal, control), {})
        tell_saved(saves, journal, wait=True)
    run.pulse.phase(REDUCE)
    run.world.all_objects(None)  # whoever ends first takes the others along, and rank 0 has to save
    kept = f"{name} holds the state, which is good" if trained else "not one step was good, so nothing is lost"
    raise DivergedError(
        f"{why_end}; {kept}. Look at these samples and at the loss in journal.jsonl; lower OPTIMIZATION.LR or "
        "GRAD_NORM_CLIP, or leave out USE_AMP. The same command goes on"
    )


def untrained(run: RunState) -> list[str]:
    """A line for the user if the model has got trainable parameters that no step changes."""
    names = run.engine.strangers()
    if not names:
        return []
    return [
        f"not trained, since they came or were unfrozen after training began: {', '.join(names[:5])}"
        f"{', ...' if names[5:] else ''}. Make them, trainable, in build_model"
    ]


def finish_evaluation(
    run: RunState, task: Task, feed: Feed, saves: Saves, journal: Journal, control: Control, name: str | None
) -> None:
    """Collective. Evaluate, and write the metrics to the journal and to checkpoint `name`."""
    started = time.perf_counter()
    metrics, predictions = evaluate(run, task, feed)
    run.pulse.phase(CHECKPOINT)
    if run.plan.finished(run.progress):  # those of earlier epochs would take up memory while training goes on
        run.predictions = predictions
    write_notes(run, task, journal)
    better = saves.store.is_better(metrics, run.best)
    if better:
        run.best = {"epoch": run.progress.epoch, "step": run.progress.step, "metrics": metrics}
    run.metrics, run.unevaluated = metrics, None
    journal.write(
        "eval",
        epoch=run.progress.epoch,
        step=run.progress.step,
        metrics=metrics,
        best=better,
        samples=len(feed.datasets["val"]),
        seconds=time.perf_counter() - started,
    )
    metric = saves.policy.METRIC
    if metric is not None and not math.isfinite(metrics[metric]):
        told = f"{metric} is {metrics[metric]} after epoch {run.progress.epoch}, so that epoch is none of the best ones"
        journal.write("event", event="warning", message=f"{told} (CHECKPOINT.METRIC)")
    if run.world.is_first and name is not None:
        saves.add_metrics(name, metrics)


def write_notes(run: RunState, task: Task, journal: Journal) -> None:
    for note in (*run.take_notes(), *task.take_notes()):
        journal.write("event", event="note", message=note)


def tell_stragglers(run: RunState, journal: Journal) -> None:
    for message in run.stragglers.found(time.monotonic()) if run.stragglers else ():
        journal.write("event", event="straggler", message=message)


def save_checkpoint(
    run: RunState,
    saves: Saves,
    journal: Journal,
    control: Control,
    metrics: dict[str, float | None] | None = None,
    may_be_replaced: bool = False,
) -> Pending | None:
    """Rank 0 begins to save the run's state; one with NaN in it is refused, so the last good one stays the newest.

    metrics: none, {}, where no evaluation is to follow;  None where it is owed, or the epoch is not over
    may_be_replaced: by a newer one, should it still wait to be written then
    """
    if not run.world.is_first:
        return None
    if not bool(run.engine.stepper.are_finite()):
        bad = [name for name, param in run.model.named_parameters() if not bool(param.isfinite().all())]
        raise DivergedError(
            f"after step {run.progress.step} the weights are no longer finite ({', '.join(bad[:3])}"
            f"{', ...' if len(bad) > 3 else ''}); they were not saved and the last good checkpoint is untouched. "
            "Lower OPTIMIZATION.LR or GRAD_NORM_CLIP, or look at the loss in journal.jsonl"
        )
    journal.flush()  # the steps that no resume from this checkpoint takes again
    return saves.save(run, metrics, control.now(), may_be_replaced)


def tell_saved(saves: Saves, journal: Journal, wait: bool = False) -> None:
    """The journal tells of each checkpoint once it is on the storage; with `wait`, of all that are on their way."""
    if wait:
        saves.settle()
    for save in saves.finished():
        journal.write(
            "checkpoint",
            name=save.name,
            epoch=save.progress.epoch,
            step=save.progress.step,
            stall_s=save.stall_s,
            save_s=save.save_s,
        )
