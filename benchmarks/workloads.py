"""The workloads as raytrain's tasks: `TASK: benchmarks.workloads:Overhead`, `:Conv`, ...."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.pieces import CONV, HEAVY, LIGHT, OVERHEAD, WATCH, Samples, Stopwatch, Workload
from raytrain import ModelReturn, Task


class Timed(Task):
    """A workload under the watch. MODEL says how many samples, which steps are timed, and where that is written."""

    random_samples = False  # nothing is augmented here, and no other loop seeds anything for a sample
    workload: Workload

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.watch = Stopwatch(Path(cfg.MODEL.FOLDER) / WATCH, cfg.MODEL.WARMUP, cfg.MODEL.LAST)
        self.watch.stamp("task made")

    def build_dataset(self, split: str) -> Samples | None:
        return Samples(self.workload.sample_shape, self.cfg.MODEL.NUM_SAMPLES) if split == "train" else None

    def build_model(self, dataset: Samples) -> torch.nn.Module:
        model = self.workload.model()
        self.watch.stamp("model built")
        return model

    def model_func(self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> ModelReturn:
        inputs, targets = batch
        self.watch.tick()
        return ModelReturn(cross_entropy(model(inputs), targets))


class Overhead(Timed):
    workload = OVERHEAD


class Conv(Timed):
    workload = CONV


class Heavy(Timed):
    workload = HEAVY


class Light(Timed):
    workload = LIGHT
