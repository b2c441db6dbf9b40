"""Tasks as people write them train without a word, also when they go on; what is worth one comes once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_bits
from small_runs import config, journal, notes, run_until, train
from tasks_with_habits import HABITS, Habit

from raytrain.storage.state_file import load_weights_file


def of(folder: Path, habit: str, workers: int = 0, epochs: int = 2) -> Any:
    tree = {"TASK": f"tasks_with_habits:{habit}", "LOADER": {"WORKERS": workers}}
    return config(folder, habit, {"NUM_EPOCHS": epochs}, **tree)


@pytest.mark.parametrize("habit", HABITS)
def test_of_an_ordinary_task_nothing_is_told_and_a_stop_changes_no_bit(
    habit: type[Habit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HABIT_PARALLELISM", "HABIT_ROOT"):
        monkeypatch.setenv(name, "")  # to be put back
        os.environ.pop(name)
    whole = train(of(tmp_path / "whole", habit.__name__))
    run_until(of(tmp_path / "parts", habit.__name__), stop_at=8)
    parts = train(of(tmp_path / "parts", habit.__name__))
    assert notes(whole.run_dir) == notes(parts.run_dir) == []
    assert_same_bits(*(load_weights_file(f"{r.checkpoint}/checkpoint.pth")["model_state"] for r in (whole, parts)))
    if habit.__name__ == "Remembers":
        resumed = [[step["terms"]["resumed"] for step in journal(r.run_dir, "step")] for r in (whole, parts)]
        assert resumed == [[0.0] * 12, [0.0] * 8 + [1.0] * 4]


def test_what_each_loader_worker_tells_with_numbers_of_its_own_comes_once(tmp_path: Path) -> None:
    result = train(of(tmp_path, "Counts", workers=2, epochs=3))
    told = [note.partition(" and is in no")[0] for note in notes(result.run_dir)]
    assert told == ["Reads.reads changed while samples were made"]


def test_what_collate_reads_of_a_task_that_changes_is_told_where_loader_workers_collate(tmp_path: Path) -> None:
    """Saved or not: they have it as it was when they began."""
    (told,) = notes(train(of(tmp_path, "Grows", workers=1)).run_dir)
    assert told.startswith("Grows.scale (1.0, now ") and "Grows.collate reads it: in loader workers" in told
