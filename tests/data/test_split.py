"""A sample is a function of (seed, epoch, sample id) whoever owns the generators, or is named."""

from __future__ import annotations

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
    assert [note.split(" was changed")[0] for note in feed.notes] == (["data set: train.mosaic"] if workers else [])


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
