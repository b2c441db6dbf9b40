"""PointPillars on simulated scenes: the same task under raytrain's loop and under one written by hand, in one process.

`python -m benchmarks.lidar LOADERS lidar WARMUP TIMED EPOCHS AFTER FOLDER` is the loop that is written by hand.
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader

from benchmarks.contenders import CONFIG, Contender, config_of, in_run_folder, kept
from benchmarks.measure import ROOT
from benchmarks.pieces import GRAD_NORM_CLIP, LIDAR, LR, WATCH, WEIGHT_DECAY, Assignment, Stopwatch
from raytrain import ModelReturn
from raytrain.batch import tensorised
from raytrain.config.load import load_config
from raytrain.tasks.pointpillars.task import PointPillars

SCENES = 96  # different ones; making a scene is the same work under both loops
WATCHED = "BENCHMARK_WATCHED_STEPS"


class TimedPillars(PointPillars):
    """Under the watch; the environment says which steps are timed, and where that is written."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        warmup, last, folder = os.environ[WATCHED].split(" ", 2)
        self.watch = Stopwatch(Path(folder) / WATCH, int(warmup), int(last))

    def model_func(self, model: torch.nn.Module, batch: dict[str, Any]) -> ModelReturn:
        self.watch.tick()
        return super().model_func(model, batch)


def written(assignment: Assignment, loaders: int) -> Path:
    """The config of an assignment, as a file."""
    os.environ[WATCHED] = f"{assignment.span.warmup} {assignment.span.last} {assignment.folder}"
    tree = yaml.safe_load((ROOT / "configs" / "pointpillars_sim.yaml").read_text())
    timed = config_of(assignment, ranks=1)
    tree |= {key: copy.deepcopy(timed[key]) for key in ("SEED", "OUTPUT", "OPTIMIZATION", "SCALE", "CHECKPOINT")}
    tree |= {
        "TASK": "benchmarks.lidar:TimedPillars",
        "LOADER": {"WORKERS": loaders},
        "EVAL": {"EVERY": None, "PICTURES": 0},
    }
    samples = (assignment.span.last + assignment.span.after) * LIDAR.batch_size
    scenes = min(SCENES, samples)
    tree["DATA_CONFIG"]["SIMULATION"]["NUM_SCENES"] = {"train": scenes, "val": 4}
    tree["OPTIMIZATION"]["NUM_EPOCHS"] = -(-samples // scenes)
    path = assignment.folder / CONFIG
    path.write_text(yaml.safe_dump(tree))
    return path


def contenders(loaders: int) -> list[Contender]:
    """Hand-written, and raytrain."""

    def by_hand(assignment: Assignment) -> list[str]:
        return [sys.executable, "-m", "benchmarks.lidar", str(loaders), *assignment.words()]

    def by_raytrain(assignment: Assignment) -> list[str]:
        words = ["train", "--cfg_file", str(written(assignment, loaders)), "--num_workers", "0"]
        return [sys.executable, "-m", "raytrain", *words]

    return [
        Contender("plain", "hand-written, one process", 1, by_hand, kept),
        Contender("raytrain-here", "raytrain, --num_workers 0", 1, by_raytrain, in_run_folder),
    ]


def train(assignment: Assignment, loaders: int) -> None:
    """The loop that everyone writes, with the task's model, samples and loss."""
    torch.set_num_threads(1)
    cfg = load_config(written(assignment, loaders))
    device, task = torch.device(assignment.device), TimedPillars(cfg)
    dataset: Any = task.build_dataset("train")
    model = task.build_model(dataset).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    loader = DataLoader(
        dataset,
        LIDAR.batch_size,
        shuffle=True,
        num_workers=loaders,
        collate_fn=task.collate,
        pin_memory=device.type == "cuda",
        persistent_workers=loaders > 0,
    )
    for _ in range(cfg.OPTIMIZATION.NUM_EPOCHS):
        for batch in loader:
            with assignment.autocast():
                returned = task.model_func(model, task.to_device(tensorised(batch), device))
            optimizer.zero_grad()
            returned.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_NORM_CLIP)
            optimizer.step()
    assignment.keep(model.state_dict(), float(returned.loss))


if __name__ == "__main__":
    train(Assignment.of_words(sys.argv[2:]), int(sys.argv[1]))
