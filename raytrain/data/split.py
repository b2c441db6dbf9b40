"""One split of the data, in the process that loads it: told of its epoch, drawn by key, and held to it.

A sample has to be a function of (seed, epoch, sample id). What it draws is seeded so, whoever owns the generators; what
cannot be seeded, and what walks on with each fetch, shows when a sample is fetched twice.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from raytrain.batch import tensorised
from raytrain.engine.object_graph import difference, is_dataset, values_of, walk
from raytrain.engine.own_state import has_state, with_state
from raytrain.engine.randomness import Randomness
from raytrain.errors import DataError
from raytrain.task import Task

KEPT = "something in it was drawn when it was first made and is kept since (a cache)"
HEAD_BYTES = 65536  # of an array that a data set holds, to see whether a fetch has changed it


class Split:
    """A data set and the task's collate, seeded for each sample and batch.

    where: what it is at, for the message of an error
    """

    def __init__(self, name: str, dataset: Any, task: Task, seed: int) -> None:
        self.name, self.dataset, self.task, self.seed = name, dataset, task, seed
        self.where = f"data set {name!r}"
        self._notes: tuple[str, ...] = ()
        self._randomness = Randomness(dataset=dataset, task=task)
        self._set_epochs = set_epochs_of(dataset)
        self._length: int | None = len(dataset)
        self._has_own_collate = type(task).collate is not Task.collate
        # What has a state of its own may go on with each call: checkpoints hold it, and data/changes.py watches it.
        self._is_repeatable = not with_state(dataset, name)
        self._collates_again = self._has_own_collate and not has_state(task)
        self._epoch, self._is_first = -1, True

    def begin_epoch(self, epoch: int) -> None:
        """Tell the data set, and those behind it, before the first sample of an epoch that this process loads.

        Each process tells each epoch, in order, also those that another loaded or that were before a resume: some
        data sets go on from what the last one left, as an order does that is shuffled in place.
        """
        self.where = f"data set {self.name!r}"
        for each in range(self._epoch + 1, epoch + 1) if self._set_epochs else ():
            for path, set_epoch in self._set_epochs.items():
                self._randomness.seed(self.seed, "set_epoch", self.name, each, path)
                set_epoch(each)
            self._randomness.find()  # they may have been made anew
        if self._length is not None and len(self.dataset) != self._length:
            self.task.note(
                f"set_epoch({epoch}) has made data set {self.name!r} one of {len(self.dataset)} samples; it had "
                f"{self._length} when the run was planned, so each epoch takes those of 0 to {self._length - 1}. Let "
                "its len() stay the same, and set_epoch choose which samples these are"
            )
            self._length = None  # told once
        self._is_first = self._epoch < 0
        self._epoch = epoch

    def batch(self, epoch: int, ids: tuple[int, ...]) -> Any:
        """The batch of these samples."""
        return self._collated([self._sample(epoch, sample_id) for sample_id in ids], epoch, ids)

    def first_batch(self, epoch: int, ids: tuple[int, ...]) -> Any:
        """The batch of these samples, the first of an epoch in this process; what is not as it must be is noted.

        Its first sample is fetched twice, and collated twice where the task collates itself.
        """
        state = None if self.task.random_samples else self._randomness.state()
        sample_id, *others = ids
        samples = [self._first_sample(epoch, sample_id), *(self._sample(epoch, each) for each in others)]
        if state is not None and self._randomness.state() != state:
            raise UnseededError(
                f"a sample of data set {self.name!r} drew random numbers, which were not seeded for it: "
                f"set {type(self.task).__name__}.random_samples to True"
            )
        if self._collates_again and self._is_repeatable:
            return self._first_collated(samples, epoch, ids)
        return self._collated(samples, epoch, ids)

    def take_notes(self) -> tuple[str, ...]:
        """What a user should know of the split, since this was last asked."""
        taken, self._notes = self._notes, ()
        return taken

    def _sample(self, epoch: int, sample_id: int) -> Any:
        self.where = f"sample {sample_id} of data set {self.name!r}"
        if self.task.random_samples:
            self._randomness.seed(self.seed, "sample", self.name, epoch, sample_id)
        return self.dataset[sample_id]

    def _first_sample(self, epoch: int, sample_id: int) -> Any:
        fetch = functools.partial(self._sample, epoch, sample_id)
        sample = fetch()
        if self.task.random_samples and self._is_first and self._randomness.find():
            sample = fetch()  # by generators that were only made with the one before
        if self._is_repeatable:
            drawn = self._randomness.state()
            what = f"sample {sample_id} of data set {self.name!r}"
            self._compare(what, sample, fetch)
            if self._is_repeatable and self._randomness.state() != drawn:
                self._is_repeatable = False
                self._notes += (
                    f"{what} draws other random numbers when it is made again, and is the same: {KEPT}. So it is the "
                    "same in each epoch, and another one in another loader worker or after a resume. Keep what is "
                    "loaded, and draw after that",
                )
        return sample

    def _collated(self, samples: list[Any], epoch: int, ids: tuple[int, ...]) -> Any:
        self.where = f"collate of {len(ids)} samples of data set {self.name!r}"
        if not self._has_own_collate:  # draws nothing, and gives tensors
            return self.task.collate(samples)
        self._randomness.seed(self.seed, "collate", self.name, epoch, ids[0])
        return tensorised(self.task.collate(samples))

    def _first_collated(self, samples: list[Any], epoch: int, ids: tuple[int, ...]) -> Any:
        try:
            kept = copy.deepcopy(samples)  # a collate may change what it is given
        except Exception:  # such samples cannot be collated twice, and need not be
            return self._collated(samples, epoch, ids)

        def collate() -> Any:
            return self._collated(copy.deepcopy(kept), epoch, ids)

        batch = self._collated(samples, epoch, ids)
        if self._is_first and self._randomness.find():
            batch = collate()
        self._compare(f"the batch that {type(self.task).__name__}.collate makes", batch, collate)
        return batch

    def _compare(self, what: str, first: Any, make: Callable[[], Any]) -> None:
        """Note if `make` gives another than the `first` that it gave, and why."""
        values = values_of({"": first})  # of now: `make` may write into it
        why = (
            "it draws from a generator that cannot be seeded for it (made on the spot, or of native code), or asks the "
            "clock"
        )
        try:
            again = values_of({"": make()})
            place = difference(values, again)
            if place is None:
                return
            differs = f"differs each time it is made{place and f', at {place}'}"
            held = self._held()
            third = values_of({"": make()})
            changed = difference(held, self._held())
            if changed:
                why = f"making it changes {changed}"
            elif third == again:
                differs, why = f"differs when it is made again{place and f', at {place}'}", KEPT
        except Exception as error:
            differs, why = "can be made only once", f"the second time it fails: {type(error).__name__}: {error}"
        self._is_repeatable = False
        self._notes += (
            f"{what} {differs}: {why}. So loader workers and a resume train on other samples. Let what a sample is "
            "depend on its id, on what set_epoch(epoch) sets, and on draws from random, numpy.random, torch or a "
            "generator that is an attribute of the data set",
        )

    def _held(self) -> dict[str, Any]:
        """What data set and task hold, to see what has changed."""
        return values_of({"dataset": self.dataset, "task": self.task}, HEAD_BYTES)


class UnseededError(DataError):
    """A task that promised to draw nothing has drawn."""


def set_epochs_of(dataset: Any) -> dict[str, Callable[[int], Any]]:
    """Path -> set_epoch of the data set and of those behind it, the innermost first.

    So what a data set's own set_epoch makes of those behind it comes last.
    """
    owners: dict[int, tuple[str, Callable[[int], Any]]] = {}
    for path, value in reversed(list(walk({"dataset": dataset}, plain=False))):
        is_one = value is dataset or (is_dataset(value) and hasattr(type(value), "set_epoch"))
        set_epoch = getattr(value, "set_epoch", None) if is_one else None
        if callable(set_epoch):  # that of a wrapper which hands on what it lacks belongs to what it wraps
            owners.setdefault(id(getattr(set_epoch, "__self__", set_epoch)), (path, set_epoch))
    return dict(owners.values())
