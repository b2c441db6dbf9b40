"""What follows a step: notes, journal, bad steps, memory, checkpoints, stops; in this order, from the top."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from raytrain.data.feed import Feed, Step
from raytrain.engine.engine import Stepped
from raytrain.engine.guard import BadStep
from raytrain.engine.late import LATE_STEPS
from raytrain.engine.state import RunState
from raytrain.engine.terms import Key, Sum
from raytrain.errors import DivergedError, RaytrainError, listed
from raytrain.journal.journal import Journal
from raytrain.journal.run_folder import RunFolder
from raytrain.keeper.checkpointer import Checkpointer, PendingSave
from raytrain.keeper.heartbeat import Heartbeat
from raytrain.progress import Progress
from raytrain.storage.store import checkpoint_name
from raytrain.training.bad_steps import answer, suspects
from raytrain.training.contract import FIELDS, Part, sums_of
from raytrain.training.control import Control, Restart
from raytrain.training.pictures import draw_pictures
from raytrain.training.run_journal import write_resize
from raytrain.training.step_checks import StepChecks
from raytrain.training.unsaved import UnsavedChanges
from raytrain.training.validate import Validation


class Taken(NamedTuple):
    """A step that was taken. parts: the micro-batches here, by virtual worker."""

    stepped: Stepped
    parts: dict[int, list[Part]]


class Recorder:
    """All that the loop tells, and what it is told: one object for the life of a run.

    folder:     where pictures go
    validation: of the last epoch, with rank 0's predictions; None before
    notes:      lines for the journal, to be taken out
    resize:     the change of the number of workers by which this began, until it is told
    """

    def __init__(
        self,
        run: RunState,
        feed: Feed,
        checkpointer: Checkpointer,
        journal: Journal,
        control: Control,
        heartbeat: Heartbeat,
        folder: RunFolder | None = None,
    ) -> None:
        self.run, self.feed, self.task, self.folder = run, feed, feed.task, folder
        self.checkpointer, self.journal, self.control, self.heartbeat = checkpointer, journal, control, heartbeat
        self.validation: Validation | None = None
        self.resize: Restart | None = None
        self._unsaved = UnsavedChanges(run, feed)
        self._step_checks = StepChecks(run, feed.task)
        self.notes: list[str] = []
        self._save: PendingSave | None = PendingSave.of_old(
            run.progress
        )  # what an evaluation at the very start belongs to
        self._save_wished, self._draws = False, True
        self._steps: deque[Step] = deque(maxlen=LATE_STEPS + 1)
        self._next_step_begins()

    # What the loop calls

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Collective. All that was begun to be saved is saved, and told, when the block ends, however it ends."""
        if self.run.world.is_first:
            self._unsaved.training_begins()
        self._next_step_begins()
        try:
            yield
        except BaseException:
            self.heartbeat.beat("checkpoint")
            with contextlib.suppress(RaytrainError):  # the failure above is the one to tell
                self._write_saved(wait=True)
            self.heartbeat.beat("rest")
            raise
        self._write_saved(wait=True)
        self.heartbeat.beat("rest")

    def wishes(self) -> tuple[bool, bool]:
        """What this rank wants after the step under way: that the run stops, that it is saved."""
        return self.control.stop_wished(), self.run.world.is_first and self.checkpointer.time_due(self.control.now())

    def terms(self, parts: Mapping[int, Sequence[Part]]) -> list[Mapping[Key, Sum]] | None:
        """What is recorded of the step under way beside its loss, of each virtual worker; None if no record is due."""
        per_epoch = self.run.plan.steps_per_epoch
        due = self.journal.wants(self._began.step + 1, self._began.step % per_epoch, per_epoch)
        return [sums_of(of_worker, self.task) for of_worker in parts.values()] if due else None

    def stepped(self, step: Step, taken: Taken) -> bool:
        """Collective. All that follows a step; False if the run is to stop here."""
        self.heartbeat.beat("checkpoint")
        self.control.stepped()
        if self.resize is not None:
            write_resize(self.journal, self.resize, self.run.world.size, self.control.now())
            self.resize = None
        if not self._steps:  # the first since an epoch began
            self.notes += self._step_checks.first_step_done()
        self._steps.append(step)
        self.notes += followed(self.run)
        self._unsaved.stepped()
        self._write_notes()
        self._write_step(step, taken)
        if taken.stepped.bad_step is not None:
            self._handle_bad_step(taken.stepped.bad_step, taken.parts)
        if self.checkpointer.after_step(self.run):
            self.journal.hand_over()  # what a run that goes on from that memory would not measure again
        self._write_saved()
        self._write_stragglers()
        stop_granted, self._save_wished = taken.stepped.wishes
        is_same_epoch = self.run.progress.epoch == self._began.epoch
        due = self._save_wished or self.checkpointer.store.progress_due(self.run.progress, epoch_done=False)
        if due and is_same_epoch and not stop_granted:
            self.control.saved(self.save(may_be_replaced=True), {})
            self._save_wished, self._clock_s = False, time.perf_counter()
        self._next_step_begins(self._clock_s)
        return not stop_granted

    def epoch_done(self, is_whole: bool, evaluates: bool) -> None:
        """Collective. Save what is due when an epoch is over, or a stop was granted in it (not is_whole).

        Before the evaluation: whatever happens in there, the epoch is not trained again.
        evaluates: whether its evaluation follows, or is owed: a stop may be granted with the epoch's last step
        """
        run = self.run
        due = not is_whole or self._save_wished or evaluates or run.plan.finished(run.progress)
        due = due or self.checkpointer.store.progress_due(run.progress, epoch_done=True)
        self._steps.clear()
        self._step_checks.epoch_done()
        self.heartbeat.step(run.progress.step)
        if not (is_whole and evaluates):
            self._tell_unsaved()
        if due:
            self._save = self.save(metrics=None if evaluates else {})
            if evaluates and is_whole:
                run.unevaluated = checkpoint_name(run.progress)
            else:
                self.control.saved(self._save, {})
        elif self.checkpointer.after_epoch(run):
            self.journal.hand_over()
        self._save_wished = False
        self._next_step_begins()
        if evaluates:
            self.heartbeat.step(run.progress.step)  # whoever hangs in the evaluation does so at the step just done

    def evaluated(self, validation: Validation) -> bool:
        """Collective. Write the metrics to the journal and to the epoch's checkpoint; False if the run ends early."""
        run, metrics = self.run, validation.metrics
        self.heartbeat.beat("checkpoint")
        is_last = run.plan.finished(run.progress)
        if is_last:  # predictions of earlier epochs would take up memory while training goes on
            self.validation = validation
        self._tell_unsaved()
        better = self.checkpointer.store.is_better(metrics, run.best)
        if better:
            run.best = {"epoch": run.progress.epoch, "step": run.progress.step, "metrics": metrics}
        name, run.metrics, run.unevaluated = run.unevaluated, metrics, None
        self._write_evaluation(validation, better)
        if run.world.is_first and name is not None:
            self.checkpointer.add_metrics(name, metrics)
        self.control.saved(self._save, metrics)
        self.heartbeat.beat("rest")  # pictures and the answer may take their time
        if run.world.is_first and not is_last and self._is_first_evaluation():
            self.draw(validation)
        goes_on = run.world.broadcast_object(run.world.is_first and self.control.goes_on(run.progress, metrics))
        self._next_step_begins()
        return bool(goes_on) or is_last

    # What the run's start and end call besides

    def draw(self, validation: Validation | None) -> str | None:
        """Where pictures of what was predicted lie, None if there are none; what went wrong once is not tried again."""
        if self.folder is None or validation is None or not self._draws:
            return None
        drawn = draw_pictures(self.folder, self.run, self.feed, validation.predictions, self.journal)
        self._draws = drawn is not None
        return drawn

    def save(self, metrics: dict[str, float | None] | None = None, may_be_replaced: bool = False) -> PendingSave | None:
        """Rank 0 begins to save the run's state; one with NaN in it is refused, so the last good one stays the newest.

        metrics: none, {}, where no evaluation is to follow;  None where it is owed, or the epoch is not over
        may_be_replaced: by a newer one, should it still wait to be written then
        """
        run = self.run
        if not run.world.is_first:
            return None
        if not bool(run.engine.stepper.are_finite()):
            bad = [name for name, param in run.model.named_parameters() if not bool(param.isfinite().all())]
            raise DivergedError(
                f"after step {run.progress.step} the weights are no longer finite ({listed(bad)}); they were not "
                "saved and the last good checkpoint is untouched. "
                "Lower OPTIMIZATION.LR or GRAD_NORM_CLIP, or look at the loss in journal.jsonl"
            )
        self.journal.flush()  # the steps that no resume from this checkpoint takes again
        return self.checkpointer.save(run, metrics, self.control.now(), may_be_replaced)

    # Each record

    def _next_step_begins(self, clock_s: float | None = None) -> None:
        """From now on (or since clock_s) it is the next step that takes time."""
        self._began: Progress = self.run.progress
        self._clock_s = time.perf_counter() if clock_s is None else clock_s
        self.heartbeat.step(self.run.progress.step + 1)

    def _write_step(self, step: Step, taken: Taken) -> None:
        """The record of a step, where one is due. Its numbers stay on the device."""
        run, began, now_s = self.run, self._began, time.perf_counter()
        data_s, step_s, self._clock_s = self.feed.take_wait_s(), now_s - self._clock_s, now_s
        if taken.stepped.terms is None:
            return
        settings, terms = run.schedule.at(began.step), taken.stepped.terms
        tb_dict, disp_dict = ({key[1]: mean for key, mean in terms.items() if key[0] == field} for field in FIELDS)
        self.journal.step(
            step=run.progress.step,
            epoch=began.epoch,
            iteration=began.step % run.plan.steps_per_epoch,
            loss=taken.stepped.loss,
            grad_norm=taken.stepped.grad_norm,
            lr=settings.lr,
            momentum=settings.momentum,
            terms=tb_dict,
            disp=disp_dict,
            samples=step.consumed,
            data_s=data_s,
            step_s=step_s,
        )

    def _is_first_evaluation(self) -> bool:
        """Of the whole run."""
        return not any(map(self.feed.evaluates_after, range(1, self.run.progress.epoch)))

    def _write_evaluation(self, validation: Validation, better: bool) -> None:
        epoch, metrics, metric = self.run.progress.epoch, validation.metrics, self.checkpointer.policy.METRIC
        self.journal.write(
            "eval",
            epoch=epoch,
            step=self.run.progress.step,
            metrics=metrics,
            best=better,
            samples=len(self.feed.datasets["val"]),
            seconds=validation.seconds,
        )
        if metric is not None and not math.isfinite(metrics[metric]):
            message = f"{metric} is {metrics[metric]} after epoch {epoch}, so that epoch is none of the best ones"
            self.journal.write("event", event="warning", message=f"{message} (CHECKPOINT.METRIC)")

    def _write_notes(self) -> None:
        self.feed.tell_dropped(bool(self.run.engine.is_weighted))
        of_compilation = self.run.compilation.notes if self.run.compilation else []
        of_parts = self.feed.notes, self.checkpointer.notes, self.run.engine.notes
        for notes in (self.notes, *of_parts, of_compilation):
            while notes:
                self.journal.write("event", event="note", message=notes.pop(0))
        for note in self.task.take_notes():
            self.journal.write("event", event="note", message=note)

    def _tell_unsaved(self) -> None:
        """What has changed in the first epoch, its evaluation included, and will not be saved."""
        self.notes += self._unsaved.epoch_done()
        self.feed.tell_changes()
        self._write_notes()

    def _write_stragglers(self) -> None:
        if self.heartbeat.stragglers is not None:
            for message in self.heartbeat.stragglers.warnings(time.monotonic()):
                self.journal.write("event", event="straggler", message=message)

    def _write_saved(self, wait: bool = False) -> None:
        """The journal tells of each checkpoint once it is on the storage; with `wait`, of all that are on their way."""
        if wait:
            self.checkpointer.settle()
        for save in self.checkpointer.finished():
            self.journal.write(
                "checkpoint",
                name=save.name,
                epoch=save.progress.epoch,
                step=save.progress.step,
                weights=save.weights or None,
                stall_s=save.stall_s,
                save_s=save.save_s,
            )

    def _handle_bad_step(self, bad_step: BadStep, parts: Mapping[int, Sequence[Part]]) -> None:
        """Collective. Tell of a bad step, which has changed nothing, and end the run where that is asked for."""
        why_end = answer(self.run, self.journal, bad_step, suspects(bad_step, self._steps, parts))
        if why_end is not None:
            had_good_step = bad_step.in_a_row < self.run.progress.step - bad_step.ago
            if self.run.engine.guard.takes_again(bad_step):
                self.run.progress = self._began
            self._save_and_raise(why_end, had_good_step)

    def _save_and_raise(self, why_end: str, had_good_step: bool) -> NoReturn:
        """Collective. Save the state, in which no bad step has left anything, and raise what ends the run."""
        run, name = self.run, checkpoint_name(self.run.progress)
        owed = had_good_step and run.world.is_first
        store = self.checkpointer.store
        if run.world.broadcast_object(owed and name not in [saved.name for saved in store.listed()]):
            self.control.saved(self.save(), {})
            self._write_saved(wait=True)
        self.heartbeat.beat("reduce")
        run.world.all_objects(None)  # whoever ends first takes the others along, and rank 0 has to save
        good = f"{name} holds the state, which is good"
        kept = good if had_good_step else "not one step was good, so nothing is lost"
        raise DivergedError(
            f"{why_end}; {kept}. Look at these samples and at the loss in journal.jsonl; lower OPTIMIZATION.LR or "
            "GRAD_NORM_CLIP, or leave out USE_AMP. The same command goes on"
        )


def followed(run: RunState) -> list[str]:
    """A line for the user if forward has turned out to change parameters by itself."""
    names, run.engine.newly_followed = run.engine.newly_followed, []
    if not names:
        return []
    return [
        "parameters that forward itself changes (a momentum encoder, a queue) are kept as buffers are, with virtual "
        f"worker 0's values: {listed(names)}"
    ]
