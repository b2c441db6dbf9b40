"""What changes while a run trains and is in no checkpoint: a counter of the task's, a list of the model's."""

from __future__ import annotations

from raytrain.data.feed import Feed
from raytrain.engine.attributes import Look, Saved, Watch, changes, look, look_into_model
from raytrain.engine.object_graph import names_in
from raytrain.engine.state import RunState
from raytrain.errors import listed
from raytrain.training.validate import look_into_task


class UnsavedChanges:
    """Compares the attributes of task and model over the first epoch that this process trains, and some later ones.

    What is only made in the first step, such as a cache, counts from there on. Data sets are compared where they are
    used, which may be a loader worker: data/loader.py.
    """

    def __init__(self, run: RunState, feed: Feed) -> None:
        self._run, self._feed = run, feed
        self._began = run.progress
        self._task: Look = {}
        self._model: Look = {}
        self._saved: Look = {}
        self._looks = 0
        self._watch, self._stale_watch = Watch(), Watch()

    def training_begins(self) -> None:
        """Of this run, or of its next epoch."""
        self._began = self._run.progress
        if self._watch.epoch_begins():
            self._add()

    def stepped(self) -> None:
        """After each step; it is looked after the first."""
        if self._looks == 1:
            self._add()

    def epoch_done(self) -> list[str]:
        """What a user should know, a line for task and model each; each attribute once, when something was trained."""
        if self._run.progress == self._began or not self._run.world.is_first:
            return []
        notes = self._notes() if self._looks else []
        self._task, self._model, self._saved, self._looks = {}, {}, {}, 0
        self.training_begins()
        return notes

    def _notes(self) -> list[str]:
        name = type(self._feed.task).__name__
        saved = Saved(self._saved, look(self._run.own.save()))
        now = look_into_task(self._run, self._feed.task, self._feed)
        stale = self._stale_watch.new(self._stale(now))
        task = self._watch.new(changes(self._task, now, saved))
        model = self._watch.new(changes(self._model, look_into_model(self._run.model), saved))
        notes = []
        if task:
            notes.append(
                f"{listed(task)} changed in this epoch and is in no checkpoint, so a resumed run goes on without it. "
                "Read self.progress (epoch, step, share) instead, or write state_dict() and load_state_dict(state) in "
                f"{name}"
            )
        if model:
            notes.append(
                f"{listed(model)} changed in this epoch and is in no checkpoint, so a resumed run goes on without it. "
                "Make it a tensor, by register_buffer() without persistent=False, or compute it of self.progress in "
                "model_func; register hooks in build_model"
            )
        if stale:
            notes.append(
                f"{listed(stale)} changed in this epoch, and {name}.collate reads it: in loader workers, which have it "
                "as it was when they began. Read self.progress in collate, or set LOADER.WORKERS: 0"
            )
        return notes

    def _stale(self, now: Look) -> list[str]:
        """Of the task's attributes that have changed, saved or not, those that its collate names in other processes."""
        code = getattr(type(self._feed.task).collate, "__code__", None)
        if code is None or not self._feed.loader_cfg.WORKERS:
            return []
        named = names_in(code)
        changed = changes(self._task, now, Saved({}, {}))
        return [each for each in changed if each.split(" ")[0].split(".")[1] in named]

    def _add(self) -> None:
        """What was not there at an earlier look."""
        self._looks += 1
        self._task = {**self._watch.known(look_into_task(self._run, self._feed.task, self._feed)), **self._task}
        self._model = {**self._watch.known(look_into_model(self._run.model)), **self._model}
        self._saved = {**look(self._run.own.save()), **self._saved}
