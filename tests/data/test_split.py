"""A sample is a function of (seed, epoch, sample id) whoever owns the generators, or is named."""

from __future__ import annotations

import random
import re
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from feeds import feed_of, whole_run
from own_generators import (
    IMPURE,
    KEPT,
    NOT_KEPT,
    OWNERS,
    TOLD,
    AnyTask,
    Closed,
    CountsBatches,
    MadeOnTheSpot,
    Mixes,
    MixesUnseeded,
    Numpys,
    Pythons,
    Samples,
    Streamed,
    Tells,
    Together,
    Told,
    Walking,
)
from tasks_for_units import Draws

from raytrain.data.split import Split
from raytrain.engine.object_graph import values_of
from raytrain.engine.world import World
from raytrain.errors import DataError
from raytrain.progress import Progress
from raytrain.task import Task


def fetched(make: Callable[[], Any], start: Progress | None = None, **options: Any) -> dict[Any, Any]:
    """(split, epoch, sample id) -> the sample, of a whole run over two of those data sets; nothing was noted."""
    datasets = {"train": make(), "val": make()}
    with feed_of(datasets=datasets, task=AnyTask(None), **options) as feed:  # type: ignore[arg-type]
        batches = list(whole_run(feed, start or Progress()))
        assert feed.notes == []
    samples = {(key.split, key.epoch, i): one for key, batch in batches for i, one in zip(key.ids, batch, strict=True)}
    return {key: values_of({"": sample}) for key, sample in samples.items()}


@pytest.mark.parametrize("make", [*OWNERS.values(), Closed], ids=[*OWNERS, "a closure"])
def test_a_generator_of_the_data_sets_own_is_seeded_for_each_sample(make: Callable[[], Any]) -> None:
    """The same numbers on other ranks and after a resume, and other ones for each sample and epoch."""
    whole = fetched(make)
    assert len(whole) == 5 * 22 and len({str(values) for values in whole.values()}) == 5 * 22
    rest = fetched(make, Progress(1, 12, 6))
    assert len(rest) == 22 + 10 + 2 * 22 and rest == {key: whole[key] for key in rest}
    parts = [fetched(make, world=World(rank, 2, 2)) for rank in range(2)]
    assert parts[0] | parts[1] == whole


def test_loader_workers_change_no_number_of_a_data_sets_own_generator() -> None:
    def make() -> Any:
        return Together({name: owner() for name, owner in [*OWNERS.items(), *TOLD.items()]})

    assert fetched(make, workers=2) == fetched(make)


def test_no_two_generators_give_the_same_numbers() -> None:
    class Streams(Samples):
        def __init__(self) -> None:
            self.rngs = [np.random.default_rng(1) for _ in range(3)]
            self.twin = np.random.default_rng(1)

        def __getitem__(self, sample_id: int) -> Any:
            return [each.random() for each in [*self.rngs, self.twin]] + [np.random.rand(), float(torch.rand(()))]

    split = Split("train", Streams(), Task(None), 0)  # type: ignore[arg-type]
    drawn = split._sample(0, 1)
    assert len(set(drawn)) == 6


@pytest.mark.parametrize("make", TOLD.values(), ids=TOLD)
def test_set_epoch_is_seeded_and_reaches_data_sets_behind_others(make: Callable[[], Any]) -> None:
    """Each epoch once and in order, after a resume too: an order that is shuffled in place is the same then."""
    whole = fetched(make)
    rest = fetched(make, Progress(2, 12, 6))
    assert rest == {key: whole[key] for key in rest}
    by_epoch = {key[:2]: {k: v for k, v in values.items() if k != "[0]"} for key, values in whole.items()}
    assert len({str(values) for values in by_epoch.values()}) == len(by_epoch) == 5


def test_a_data_set_that_tells_those_behind_it_has_the_last_word() -> None:
    inner = Told()
    split = Split("train", Tells(inner), Task(None), 0)  # type: ignore[arg-type]
    split.begin_epoch(0)
    split.begin_epoch(1)
    assert inner.epochs == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", IMPURE)
def test_a_sample_that_is_another_each_time_is_named_with_the_reason(kind: type[Samples]) -> None:
    split = Split("train", kind(), Task(None), 0)  # type: ignore[arg-type]
    split.begin_epoch(0)
    split.first_batch(0, (17,))
    (note,) = split.take_notes()
    assert re.match(f"sample 17 of data set 'train' {IMPURE[kind]}", note)
    assert "Let what a sample is depend on its id, on what set_epoch(epoch) sets, and on draws from random" in note
    split.begin_epoch(1)
    if kind is not Streamed:  # which is at its end
        split.first_batch(1, (17,))
    assert split.take_notes() == (), "told once"


def test_a_state_of_the_tasks_hides_no_sample_that_is_another_each_time() -> None:
    class WithState(CountsBatches):
        def state_dict(self) -> dict[str, int]:
            return {"batches": self.batches}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.batches = state["batches"]

    task = WithState(None)
    split = Split("train", MadeOnTheSpot(), task, 0)
    split.begin_epoch(0)
    split.first_batch(0, (17,))
    (note,) = split.take_notes()
    assert note.startswith("sample 17 of data set 'train' differs each time it is made") and task.batches == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_told_once_for_a_split_whoever_loads_and_of_validation_too(workers: int) -> None:
    for kind in (Walking, MadeOnTheSpot):
        datasets = {"train": kind(), "val": kind()}
        with feed_of(workers, datasets=datasets, task=AnyTask(None)) as feed:  # type: ignore[arg-type]
            list(whole_run(feed))
        assert [re.findall(r"of data set '(\w+)'", note) for note in feed.notes] == [["train"], ["val"]]


def test_a_collate_draws_by_its_own_generator_as_by_the_global_ones() -> None:
    def drawn(start: Progress = Progress(), workers: int = 0) -> list[Any]:  # noqa: B008
        datasets = {"train": Numpys(), "val": Numpys()}
        with feed_of(workers, datasets=datasets, task=Mixes(None)) as feed:
            batches = list(whole_run(feed, start))
            assert feed.notes == []
        return batches

    whole = drawn()
    assert len({batch for _, batch in whole}) == len(whole)
    assert drawn(workers=1) == whole
    rest = drawn(Progress(1, 12, 6))
    assert rest == whole[-len(rest) :]


@pytest.mark.parametrize(
    ("task", "why"), [(MixesUnseeded, "it draws from a generator"), (CountsBatches, "making it changes task.batches")]
)
def test_a_collate_that_gives_another_batch_each_time_is_named(task: type[Task], why: str) -> None:
    split = Split("train", Numpys(), task(None), 0)  # type: ignore[arg-type]
    split.begin_epoch(0)
    split.first_batch(0, (3, 4))
    (note,) = split.take_notes()
    assert re.match(f"the batch that {task.__name__}.collate makes differs each time it is made: {why}", note)


def test_a_task_that_promises_not_to_draw_is_held_to_it_by_its_own_generators_too() -> None:
    task = AnyTask(None)  # type: ignore[arg-type]
    task.random_samples = False
    for kind in (Numpys, Pythons):
        said = pytest.raises(DataError, match=r"drew random .*: set AnyTask.random_samples to True")
        with feed_of(datasets={"train": kind(), "val": Draws(7)}, task=task) as feed, said:
            next(whole_run(feed))


class Mosaic(Samples):
    mosaic = True
    handle: Any = None

    def __getitem__(self, sample_id: int) -> bool:
        return self.mosaic


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_follow_what_the_training_process_changes_in_a_data_set(workers: int) -> None:
    datasets = {"train": Mosaic(), "val": Mosaic()}
    seen: dict[int, set[bool]] = {}
    with feed_of(workers, datasets=datasets, task=AnyTask(None)) as feed:  # type: ignore[arg-type]
        for key, batch in whole_run(feed):
            if key.split == "val":
                datasets["train"].mosaic = False
            else:
                seen.setdefault(key.epoch, set()).update(batch)
    assert seen == {0: {True}, 1: {True}, 2: {False}}
    assert [note.split(" was changed")[0] for note in feed.notes] == ["data set: train.mosaic"]


def test_a_data_set_that_can_no_longer_be_sent_to_loader_workers_is_named() -> None:
    datasets: dict[str, Any] = {"train": Mosaic(), "val": Mosaic()}
    with feed_of(1, datasets=datasets, task=AnyTask(None)) as feed:  # type: ignore[arg-type]
        for key, batch in whole_run(feed):
            if key.split == "val":
                datasets["train"].mosaic, datasets["train"].handle = False, lambda: None
            assert all(batch)
    (note,) = feed.notes
    assert "train.mosaic was changed in the training process; loader workers cannot be given it" in note


def test_a_data_set_without_generators_pays_nothing_for_those_of_others() -> None:
    """Per sample, in us: 7 for the global ones; each own one of numpy takes 19 more, a RandomState 4, of Python 6."""
    plain = Split("train", Draws(22), Task(None), 0)  # type: ignore[arg-type]
    assert plain._randomness._owned == {}
    best_s = min(timeit.repeat(lambda: plain._randomness.seed(0, "sample", "train", 0, 1), number=50, repeat=20)) / 50
    assert best_s < 1e-4


@pytest.mark.parametrize("kind", [*KEPT, *NOT_KEPT])
def test_what_was_drawn_once_and_is_kept_is_named(kind: type[Samples]) -> None:
    split = Split("train", kind(), Task(None), 0)  # type: ignore[arg-type]
    split.begin_epoch(0)
    split.first_batch(0, (17, 3))
    said = split.take_notes()
    assert len(said) == (kind in KEPT)
    for note in said:
        assert note.startswith("sample 17 of data set 'train' d") and " when it is made again" in note
        assert ": something in it was drawn when it was first made and is kept since (a cache). So " in note
    split.begin_epoch(1)
    split.first_batch(1, (5, 17))
    assert split.take_notes() == (), "told once"


class Resized(Samples):
    """Of another length in some epochs."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.length = lengths, lengths[0]

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.length = self.lengths[epoch + 1]

    def draw(self) -> float:
        return random.random()


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ((22, 22, 22), []),
        ((22, 11, 11), [(0, 11, 22)]),
        ((11, 22, 22), [(0, 22, 11)]),
        ((22, 22, 30), [(1, 30, 22)]),
        ((22, 30, 22), [(0, 30, 22)]),
        ((22, 12, 13), [(0, 12, 22)]),
    ],
)
def test_a_length_that_set_epoch_changes_is_told(lengths: tuple[int, ...], told: list[tuple[int, int, int]]) -> None:
    task = Task(None)  # type: ignore[arg-type]
    split = Split("train", Resized(*lengths), task, 0)
    for epoch in range(2):
        split.begin_epoch(epoch)
    notes = task.take_notes()
    for note, (epoch, now, before) in zip(notes, told, strict=True):
        assert note.startswith(f"set_epoch({epoch}) has made data set 'train' one of {now} samples; it had {before}")


class Changeable(Samples):
    """What a training process may change of it; a sample is what it holds."""

    def __init__(self) -> None:
        self.mosaic: Any = True
        self.transform: Any = Draws(1)
        self.transforms: Any = [Draws(1), Draws(2)]
        self.labels: Any = np.zeros(22)
        self.scores: Any = torch.zeros(22)
        self.cache: Any = {}
        self.file: Any = None

    def __getitem__(self, sample_id: int) -> Any:
        kinds = [type(each).__name__ for each in (self.transform, *self.transforms)]
        return [self.mosaic, *kinds, float(self.labels.sum()), float(self.scores.sum())]


CHANGES: dict[str, Callable[[Any], object]] = {
    "train.mosaic": lambda data: setattr(data, "mosaic", False),
    "train.transform": lambda data: setattr(data, "transform", Numpys()),
    "train.transforms": lambda data: data.transforms.pop(),
    "train.transforms[0]": lambda data: data.transforms.__setitem__(0, Numpys()),
    "train.transform.num_samples": lambda data: setattr(data.transform, "num_samples", 5),
    "train.labels": lambda data: data.labels.__setitem__(3, 1),
    "train.scores": lambda data: data.scores.__setitem__(3, 1),
}
NO_CHANGES: dict[str, Callable[[Any], object]] = {
    "cache": lambda data: data.cache.update({3: "made"}),
    "file": lambda data: setattr(data, "file", Pythons()),
    "nothing": lambda data: None,
}


@pytest.mark.parametrize("what", [*CHANGES, *NO_CHANGES])
def test_what_the_training_process_changes_of_a_data_set_is_seen(what: str) -> None:
    data = Changeable()
    with feed_of(datasets={"train": data, "val": Changeable()}) as feed:
        feed._held = feed._held_values()
        (CHANGES | NO_CHANGES)[what](data)
        changed = feed._changed()
    assert changed[:1] == ([what] if what in CHANGES else [])


def test_loader_workers_get_what_was_changed() -> None:
    data = {"train": Changeable(), "val": Changeable()}
    with feed_of(workers=1, datasets=data, task=AnyTask(None)) as feed:  # type: ignore[arg-type]
        made = []
        for key, batch in whole_run(feed):
            made.append((key.split, key.epoch, batch[0]))
            if key.epoch == 1:
                CHANGES["train.transforms"](data["train"]) if len(data["train"].transforms) == 2 else None
                data["train"].labels[:] = 1
        assert {str(sample) for split, epoch, sample in made if (split, epoch) == ("train", 2)} == {
            str([True, "Draws", "Draws", 22.0, 0.0])
        }
        (note,) = feed.notes
    assert note.startswith("data set: train.transforms, ") and "loader workers were started again with it" in note
