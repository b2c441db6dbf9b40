"""Promises 1 and 2 for the job that people come for: augmentation, loader workers and a hook change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from pillars_for_tests import CONFIG, NUM_SCENES
from runs import EPOCHS, Run, assert_same_bits

pytestmark = pytest.mark.ray

STEPS_PER_EPOCH = 6  # of 4 scenes, the last of 2
HERE = ("--num_workers", "0")


def lidar(folder: Path, loader_workers: int) -> Run:
    return Run(
        folder,
        {
            **CONFIG,
            "CHECKPOINT.METRIC": "Car_3d/moderate_R40",
            "LOADER.WORKERS": loader_workers,
            "EVAL": {"PICTURES": 0},
        },
    )


def test_a_detector_killed_in_mid_epoch_ends_with_the_same_bits_and_has_used_each_scene_once(tmp_path: Path) -> None:
    undisturbed = lidar(tmp_path / "undisturbed", loader_workers=0)
    undisturbed.run(*HERE)
    run = lidar(tmp_path / "killed", loader_workers=2)
    run.killed_at(9, *HERE)
    assert run.names()[-1] == "checkpoint_step_8"
    run.run(*HERE)
    assert_same_bits(run.payload(), undisturbed.payload())
    used = scenes_by_step(run)
    assert used == scenes_by_step(undisturbed)
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
        assert sorted(scene for step in steps for scene in used[step]) == list(range(NUM_SCENES))


def scenes_by_step(run: Run) -> dict[int, list[int]]:
    """Those that made the weights: of a step that was taken twice, the later ones."""
    used = {}
    for line in (run.gate / "uses.txt").read_text().splitlines():
        step, _, scenes = line.split()
        used[int(step)] = [int(scene) for scene in scenes.split(",")]
    return used
