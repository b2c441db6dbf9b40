"""What an epoch's first step shows: gradients that no step takes, seeds, threads, modes; told once, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import config, notes, run_until

from raytrain.engine.determinism import torch_differences, torch_put_back


def run_of(task: str, folder: Path, stop_at: int | None = None) -> list[str]:
    """What was told of a run of two epochs of 12 steps."""
    cfg = config(folder, task, {}).model_copy(update={"TASK": f"tasks_that_surprise:{task}"})
    with torch_put_back():
        _, run_dir = run_until(cfg, stop_at)
    return notes(run_dir)


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("LossWithWeights", "LossWithWeights.margin.centres"),
        ("LossInADict", "LossInADict.losses['margin'].centres"),
        ("LearnedWeights", "LearnedWeights.log_vars"),
        ("LayersInAList", "ListNet.layers[0].weight, ListNet.layers[0].bias, ListNet.layers[1].weight, "
                          "ListNet.layers[1].bias"),
        ("Adversary", "Adversary.critic.weight, Adversary.critic.bias"),
        ("LayersInAModuleList", None),
        ("Teacher", None),
        ("PointsTask", None),
    ],
)  # fmt: skip
def test_what_gets_gradients_and_is_not_trained_is_named(task: str, names: str | None, tmp_path: Path) -> None:
    said = [note for note in run_of(task, tmp_path) if "gets gradients" in note]
    assert len(said) == (names is not None)
    if names is not None:
        assert said[0].startswith("gets gradients but is no parameter of the model that build_model gave")
        assert f"no checkpoint holds it: {names}. Make it a part of the model" in said[0]


def test_it_is_told_again_after_a_resume(tmp_path: Path) -> None:
    run_of("LossWithWeights", tmp_path, stop_at=3)
    assert len([note for note in run_of("LossWithWeights", tmp_path) if "gets gradients" in note]) == 2


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("SeedsTorch", "torch.manual_seed is called while a step is computed"),
        ("RecomputesWithOtherNoise", "random numbers are drawn while gradients are computed. If that is torch.utils"),
        ("TakesThreads", "the task has set torch to 3 threads, which is for SCALE.THREADS to say (now 1)"),
        ("EvalOnce", "train() or eval() was called for 0, 1, 2, 3, 4 while an epoch was trained, once"),
        ("EvalOnceInside", "train() or eval() was called for 1 while an epoch was trained, once"),
        ("FreezesOnce", "frozen since training began: 0.weight, 0.bias. A resume begins with what build_model left"),
        ("RelabelsInScore", "data set: train.x was changed in the training process; training goes on with it"),
        ("SeedsAGenerator", None),
        ("Recomputes", None),
        ("EvalAlways", None),
        ("EvalAndBack", None),
        ("PointsTask", None),
    ],
)
def test_seeds_threads_and_modes_that_do_not_last_are_told(task: str, told: str | None, tmp_path: Path) -> None:
    signs = "manual_seed", "random numbers", "SCALE.THREADS", "was called for", "frozen since", "was changed in"
    said = [note for note in run_of(task, tmp_path) if any(sign in note for sign in signs)]
    assert len(said) == (told is not None) and all(note.startswith(str(told)) for note in said)


def test_on_a_gpu_kernels_that_are_tried_out_are_named_too(monkeypatch: Any) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch_differences(torch.get_num_threads(), device) == [
        "the task has set torch.backends.cudnn.benchmark, by which each run tries other kernels"
    ]
    assert torch_differences(torch.get_num_threads(), torch.device("cpu")) == []
