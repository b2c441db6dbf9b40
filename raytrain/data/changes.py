"""What of a data set changes while its samples are made: then they depend on what was loaded before, and by whom."""

from __future__ import annotations

from typing import Any

from torch.utils.data import get_worker_info

from raytrain.engine.attributes import Look, Saved, Watch, changes, look
from raytrain.engine.own_state import OwnState, with_state
from raytrain.errors import DataError, listed
from raytrain.task import Task


class SampleChanges:
    """Compares the attributes of each data set over the first epoch in which this process makes its samples, and over
    some later ones.

    After set_epoch, which may change what it likes; what is only made with the first batch, such as a cache, counts
    from there on. In a loader worker the task too, which makes batches there.
    """

    def __init__(self, task: Task, datasets: dict[str, Any]) -> None:
        self._task, self._datasets = task, datasets
        self._watches = {split: Watch() for split in datasets}
        self._split: str | None = None
        self._is_first = False
        self._before: Look = {}
        self._states: dict[str, tuple[OwnState, Look]] = {}
        self._epochs_split, self._batches = "", 0  # of the epoch that this process is in
        self._late: DataError | None = None

    def epoch_begins(self, split: str) -> None:
        """The data set of a split has just been told of its epoch."""
        dataset = self._datasets[split]
        own = OwnState(with_state(dataset, f"{split} data set"))
        self._states[split] = own, look(own.save())
        self._epochs_split, self._batches = split, 0
        if self._watches[split].epoch_begins():
            self._split, self._is_first = split, True
            self._before = self._watches[split].known(self._look())

    def batch_made(self, split: str) -> DataError | None:
        """What is to be raised: a loader worker's data set has got another state, which nobody would save.

        Looked at after the batches 1, 2, 4, 8 and so on of an epoch, and at its end: of a state with a list of 100,000
        one look takes 0.1 s.
        """
        if self._split is not None and self._is_first:
            self._is_first = False
            self._before = {**self._watches[self._split].known(self._look()), **self._before}
        self._batches += 1
        late, self._late = self._late, None
        return late or (self._other_state(split) if self._batches & (self._batches - 1) == 0 else None)

    def _other_state(self, split: str) -> DataError | None:
        own, before = self._states.get(split, (OwnState({}), {}))
        if not own.owners or not in_loader_worker() or look(own.save()) == before:
            return None
        owner = type(next(iter(own.owners.values()))).__name__
        return DataError(
            f"the state of data set {split!r} ({owner}.state_dict()) has changed in a loader worker: each has its own, "
            "and no checkpoint sees it. Set LOADER.WORKERS: 0, or let samples depend on their index and "
            "set_epoch(epoch) alone"
        )

    def tell(self) -> None:
        """The task notes what has changed since the epoch began, if that one was watched."""
        self._late = self._other_state(self._epochs_split)
        if self._split is None:
            return
        own, before = self._states[self._split]
        found = changes(self._before, self._look(), Saved(before, look(own.save())))
        found, self._split = self._watches[self._split].new(found), None
        if in_loader_worker():  # whose values are its own, and the next one's others: one line for all
            found = [each.partition(" ")[0] for each in found]
        if found:
            self._task.note(
                f"{listed(found)} changed while samples were made and is in no checkpoint; each loader worker has its "
                "own. Let a sample depend on its index and set_epoch(epoch) alone, or write state_dict() and "
                "load_state_dict(state) and set LOADER.WORKERS: 0"
            )

    def _look(self) -> Look:
        assert self._split is not None
        dataset = self._datasets[self._split]
        roots = {type(dataset).__name__: dataset}
        if in_loader_worker():
            roots[type(self._task).__name__] = self._task
        return look(roots, known=() if in_loader_worker() else [self._task])


def in_loader_worker() -> bool:
    return get_worker_info() is not None
