"""What no checkpoint holds: said once by name, or saved because task and data set say how, or not needed at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_bits
from small_runs import config, journal, notes, run_until, saved_state, train

import raytrain
from raytrain.errors import TaskError, TrainingError
from raytrain.storage.state_file import load_weights_file

STEPS = 12  # of an epoch


def small(folder: Path, task: str, workers: int = 0, **optim: Any) -> Any:
    virtual = {"SCALE": {"NUM_WORKERS": 0, "USE_GPU": False, "VIRTUAL_WORKERS": optim.pop("V", 1)}}
    return config(folder, task, optim, LOADER={"WORKERS": workers}, **virtual).model_copy(
        update={"TASK": f"tasks_with_state:{task}"}
    )


# Told


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("Counting", ["Counting.steps (0, now 12) changed in this epoch and is in no checkpoint"]),
        ("History", ["History.history, History.recent (0, now 17) changed in this epoch"]),
        ("Lazy", ["Lazy.calls (1, now 18) changed in this epoch"]),
        (
            "Nested",
            [
                "Nested.meter.total (0.0, now 18.0), Nested.counts (0, now 18), Nested.totals, Nested.numbers, "
                "Nested.centred.running_mean and 2 more changed in this epoch"
            ],
        ),
        ("InModel", ["Sequential.0.calls (0, now 18), Sequential.0.mean changed in this epoch"]),
        ("InData", ["Walking.made (0, now 53) changed while samples were made"]),
        ("InScore", ["InScore.rounds (0, now 1), InScore.scores changed in this epoch"]),
        ("Calm", []),
        ("ByProgress", []),
        ("Kept", []),
        ("KeptData", []),
    ],
)
def test_what_changed_and_is_not_saved_is_told_once(task: str, said: list[str], tmp_path: Path) -> None:
    result = train(small(tmp_path, task))
    found = [note for note in notes(result.run_dir) if "changed" in note]
    assert len(found) == len(said), found
    for note, begins in zip(found, said, strict=True):
        assert note.startswith(begins)


@pytest.mark.parametrize("stop_at", [3, STEPS])
def test_a_stop_in_the_first_epoch_tells_it_too(stop_at: int, tmp_path: Path) -> None:
    _, run_dir = run_until(small(tmp_path, "Counting"), stop_at=stop_at)
    [note] = [note for note in notes(run_dir) if "changed" in note]
    assert note.startswith(f"Counting.steps (0, now {stop_at}) changed")
    assert note.endswith("Read self.progress (epoch, step, share) instead, or write state_dict() and "
                         "load_state_dict(state) in Counting")  # fmt: skip


def test_loader_workers_tell_what_changes_in_them(tmp_path: Path) -> None:
    result = train(small(tmp_path, "InData", workers=1))
    assert [note for note in notes(result.run_dir) if note.startswith("Walking.made changed while samples")]


def test_a_state_that_changes_in_a_loader_worker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"'train' \(KeptWalking.state_dict\(\)\) has changed in a loader worker"):
        train(small(tmp_path, "KeptData", workers=1))


# The same bits


@pytest.mark.parametrize("stop_at", [5, STEPS, STEPS + 5])
@pytest.mark.parametrize("task", ["ByProgress", "Kept", "KeptData"])
def test_a_stopped_run_ends_with_the_same_bits(task: str, stop_at: int, tmp_path: Path) -> None:
    whole = train(small(tmp_path / "whole", task))
    cfg = small(tmp_path / "parts", task)
    run_until(cfg, stop_at=stop_at)
    result = train(cfg)
    expected, found = (load_weights_file(f"{r.checkpoint}/checkpoint.pth") for r in (whole, result))
    assert_same_bits(found, expected)
    assert result.metrics == whole.metrics
    weights = [[s["terms"].get("weight") for s in journal(r.run_dir, "step")] for r in (whole, result)]
    assert weights[0] == weights[1]
    assert not [note for note in notes(result.run_dir) if "not as it was" in note]


TWO = {"V": 2, "BATCH_SIZE_PER_GPU": 2}
ACCUMULATED = {"ACCUMULATE": 2, "BATCH_SIZE_PER_GPU": 2}


@pytest.mark.parametrize(("optim", "workers"), [(TWO, 0), ({}, 1), (ACCUMULATED, 0)])
def test_progress_is_that_of_the_step_whoever_makes_the_batch(
    optim: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    """model_func compares what collate was told with what it is told."""
    whole = train(small(tmp_path / "whole", "ByProgress"))
    result = train(small(tmp_path / "other", "ByProgress", workers, **optim))
    weights = [[s["terms"]["weight"] for s in journal(r.run_dir, "step")] for r in (whole, result)]
    assert weights[0] == [0.1 + step / 24 for step in range(24)]
    assert weights[1] == pytest.approx(weights[0], rel=1e-6)  # of several virtual workers they are f32

    assert (result.metrics["step"], result.metrics["share"]) == (24, 1.0)


def test_eval_has_the_progress_and_the_state_of_the_checkpoint(tmp_path: Path) -> None:
    cfg = small(tmp_path, "ByProgress")
    result = train(cfg)
    assert raytrain.evaluate(cfg).metrics == result.metrics
    _, run_dir = run_until(small(tmp_path / "stopped", "ByProgress"), stop_at=5)
    found = raytrain.evaluate(cfg, str(run_dir / "ckpt" / "checkpoint_step_5")).metrics
    assert (found["step"], found["share"]) == (5, pytest.approx(5 / 24))


@pytest.mark.parametrize("task", ["ReadsEarly", "SetsProgress"])
def test_progress_is_neither_guessed_nor_lost(task: str, tmp_path: Path) -> None:
    said = {"ReadsEarly": "was read before the first batch", "SetsProgress": "sets self.progress, which raytrain gives"}
    with pytest.raises(TaskError, match=f"{task}.* {said[task]}"):
        train(small(tmp_path, task))


# Modules in eval mode, and parameters that forward changes


@pytest.mark.parametrize(("how", "v"), [("data", 1), ("assigned", 2), ("in place", 2)])
def test_a_teacher_stays_and_a_momentum_copy_moves_the_same_over_a_stop(how: str, v: int, tmp_path: Path) -> None:
    def cfg(folder: str) -> Any:
        made = small(tmp_path / folder, "Distilled", V=v)
        return made.model_copy(update={"MODEL": {"HOW": how}})

    whole = train(cfg("whole"))
    run_until(cfg("parts"), stop_at=7)
    result = train(cfg("parts"))
    expected, found = (load_weights_file(f"{r.checkpoint}/checkpoint.pth") for r in (whole, result))
    assert_same_bits(found, expected)
    state = saved_state(result.checkpoint)
    assert not state["teacher.1.running_mean"].any() and state["slow.1.running_mean"].any()
    assert state["queue"].any()
    assert {s["terms"]["teacher"] for s in journal(result.run_dir, "step")} == {0.0}
    said = notes(result.run_dir)
    assert sum(note.startswith("parameters that forward itself changes") for note in said) == 1
    assert "in eval mode, as build_model left them, also while training: teacher" in said
    assert torch.equal(state["teacher.0.weight"], saved_state(whole.checkpoint)["teacher.0.weight"])
