"""A state that changes in a loader worker, where nobody saves it, is told; looking costs little where it is large."""

from __future__ import annotations

from typing import Any

import pytest

import raytrain
from raytrain.data.changes import SampleChanges


class Counted:
    """Its state is `place`; `looks` counts how often it was asked for."""

    def __init__(self) -> None:
        self.place, self.looks = 0, 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, sample_id: int) -> int:
        return sample_id

    def state_dict(self) -> dict[str, Any]:
        self.looks += 1
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


@pytest.fixture
def in_a_loader_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrain.data.changes.get_worker_info", object)


@pytest.mark.parametrize(("moves_in", "told_at"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, None)])
def test_a_state_that_changes_is_told_soon_or_with_the_next_epoch(
    moves_in: int, told_at: int | None, in_a_loader_worker: None
) -> None:
    dataset = Counted()
    changes = SampleChanges(raytrain.Task(None), {"train": dataset})  # type: ignore[arg-type]
    changes.epoch_begins("train")
    for batch in range(1, 13):
        dataset.place += batch == moves_in
        error = changes.batch_made("train")
        assert (error is not None) == (batch == told_at)
        if error is not None:
            assert "'train' (Counted.state_dict()) has changed in a loader worker" in str(error)
            return
    changes.tell()
    changes.epoch_begins("train")
    assert (changes.batch_made("train") is not None) == (told_at is None)
    assert changes.batch_made("train") is None


def test_a_state_is_looked_at_after_few_batches(in_a_loader_worker: None) -> None:
    dataset = Counted()
    changes = SampleChanges(raytrain.Task(None), {"train": dataset})  # type: ignore[arg-type]
    changes.epoch_begins("train")
    assert all(changes.batch_made("train") is None for _ in range(1000))
    assert dataset.looks < 16
