"""Whatever a task draws anywhere is a function of the place it is drawn at: the run ends with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import config, journal, notes, run_until, saved_state, train

from raytrain.config.sections import Config
from raytrain.training.evaluate import evaluate


def drawing(output: Path, task: str, workers: int = 0) -> Config:
    where: dict[str, Any] = {"TASK": f"own_generators:{task}", "LOADER": {"WORKERS": workers}, "EVAL": {"EVERY": 1}}
    return config(output, "", {"ACCUMULATE": 2}, **where)


def of_run(cfg: Config) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Weights, and what was drawn in steps and evaluations, of the run from where it stands."""
    result = train(cfg)
    assert notes(result.run_dir) == []
    steps = [(s["step"], s["terms"]["drawn"], s["loss"]) for s in journal(result.run_dir, "step")]
    return saved_state(result.checkpoint), [*steps, *(e["metrics"] for e in journal(result.run_dir, "eval"))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[Any]]:
    return of_run(drawing(tmp_path_factory.mktemp("whole"), "DrawsEverywhere"))


def same(one: tuple[dict[str, torch.Tensor], list[Any]], other: tuple[dict[str, torch.Tensor], list[Any]]) -> bool:
    return one[1] == other[1] and all(torch.equal(one[0][name], other[0][name]) for name in other[0])


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_a_stopped_run_draws_the_same_in_every_method(stop_at: int, whole: Any, tmp_path: Path) -> None:
    """Three steps make an epoch."""
    run_until(drawing(tmp_path, "DrawsEverywhere"), stop_at=stop_at)
    assert same(of_run(drawing(tmp_path, "DrawsEverywhere")), whole)


def test_loader_workers_draw_the_same_in_every_method(whole: Any, tmp_path: Path) -> None:
    assert same(of_run(drawing(tmp_path, "DrawsEverywhere", workers=1)), whole)


def test_an_evaluation_by_itself_draws_the_same(whole: Any, tmp_path: Path) -> None:
    cfg = drawing(tmp_path, "DrawsEverywhere")
    of_run(cfg)
    assert evaluate(cfg).metrics == whole[1][-1]


def test_a_generator_that_comes_while_training_is_named(tmp_path: Path) -> None:
    result = train(drawing(tmp_path, "DrawsLater"))
    (note,) = notes(result.run_dir)
    assert note.startswith("task.late came while training, so what was drawn from there until now was not seeded")


def test_a_sample_that_differs_each_time_is_a_note_of_the_run_and_of_an_evaluation(tmp_path: Path) -> None:
    cfg = drawing(tmp_path, "DrawsUnseeded")
    found = notes(train(cfg).run_dir)
    assert [note.split(" differs each time it is made, at [1]")[0] for note in found] == [
        f"sample {found[0].split()[1]} of data set 'train'",
        "sample 0 of data set 'val'",
    ]
    assert evaluate(cfg).notes == found[1:]
