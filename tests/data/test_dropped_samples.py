"""A collate that drops samples is seen by the lengths of its batches, and nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import config, notes, train

from raytrain.data.dropped_samples import DroppedSamples


def x(length: int) -> torch.Tensor:
    return torch.zeros(length, 3)


WHOLE = [(4, {"x": x(4), "name": ["a"] * 4})] * 3


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([*WHOLE, (4, {"x": x(3), "name": ["a"] * 3})], "3 of 4 samples (by the length of x and name)"),
        ([(4, {"x": x(2), "name": ["a"] * 2}), *WHOLE], "2 of 4 samples (by the length of x and name)"),
        ([(4, x(4)), (4, x(4)), (3, x(3)), (4, x(3))], "3 of 4 samples (by the length of the batch)"),
        ([(4, (x(4), x(4)))] * 3 + [(2, (x(1), x(1)))], "1 of 2 samples (by the length of 0 and 1)"),
        # Of the last batch there are fewer.
        ([*WHOLE, (2, {"x": x(2), "name": ["a"] * 2})], None),
        # Too few whole ones to know what counts samples.
        ([*WHOLE[:2], (4, {"x": x(3), "name": ["a"] * 3})], None),
        # One box for each image, most often.
        ([(4, {"x": x(4), "boxes": x(4)})] * 3 + [(4, {"x": x(4), "boxes": x(3)})], None),
        ([(4, {"images": [x(9)] * 4, "boxes": x(4)})] * 3 + [(4, {"images": [x(9)] * 4, "boxes": x(3)})], None),
        # Points of all samples.
        ([(4, x(4))] * 3 + [(4, x(3)), (4, x(900))], None),
        ([(4, {"points": x(900), "names": "abc"})] * 5, None),
        # Tokens by time, cut off at as many as there are samples.
        ([(4, {"tokens": torch.zeros(4, 4)})] * 3 + [(4, {"tokens": torch.zeros(3, 4)})], None),
        # One entry alone is shorter, by as much as it likes.
        ([*WHOLE, (4, {"x": x(3), "name": ["a"] * 2})], None),
        ([(4, None)] * 5, None),
    ],
)
def test_samples_that_are_dropped_are_counted(batches: list[tuple[int, Any]], said: str | None) -> None:
    dropped = DroppedSamples()
    for num_samples, batch in batches:
        dropped.see(num_samples, batch)
    assert dropped.described() == said


@pytest.mark.parametrize(("task", "is_told"), [("DropsSamples", True), ("DropsAndWeighs", False), ("Collates", False)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_collate_drops_samples_says_so_once(task: str, is_told: bool, workers: int, tmp_path: Path) -> None:
    cfg = config(tmp_path, "", {}, TASK=f"tasks_that_surprise:{task}", LOADER={"WORKERS": workers})
    said = [note for note in notes(train(cfg).run_dir) if "drops some" in note]
    assert len(said) == is_told
    assert all(note.startswith("a batch holds 3 of 4 samples (by the length of 0 and 1)") for note in said)
