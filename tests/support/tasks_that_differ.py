"""A task whose classes are numbered by a set of names, and that can be built otherwise from one process to the next.

DATA_CONFIG.BUILD: a folder; what a file of a name in `CHANGES` is there for, is built otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import ConcatDataset, Dataset

from raytrain import ModelReturn, Task

NAMES = ["cat", "dog", "fox", "owl", "pig", "rat", "yak", "zebu"]
CLASSES = list(set(NAMES))
NUMBER_OF = {name: number for number, name in enumerate(CLASSES)}
FEATURES = 4


class Animals(Dataset[Any]):
    """x (FEATURES,) float32, y () int64, and how the process that loads numbers the names."""

    def __init__(self, size: int, changes: frozenset[str]) -> None:
        self.x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(5))
        self.names = [NAMES[i % len(NAMES)] for i in range(size)]
        self.changes = changes
        self.classes = CLASSES[::-1] if "classes" in changes else list(CLASSES)
        if "file" in changes:
            self.x[-1] += 1
        if "labels" in changes:
            self.names.reverse()
        self.generator = np.random.default_rng()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self.x[index]
        if "unseeded" in self.changes:
            x = x + float(self.generator.random())
        return {"x": x, "y": NUMBER_OF[self.names[index]], "order": torch.tensor([*map(NUMBER_OF.get, NAMES)])}


class AnimalsTask(Task):
    @property
    def changes(self) -> frozenset[str]:
        folder = Path(self.cfg.DATA_CONFIG.get("BUILD", "nowhere"))
        return frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()

    def build_dataset(self, split: str) -> Any:
        changes = self.changes
        size = {"train": 24, "val": 8}[split] + 4 * (f"longer_{split}" in changes)
        size += 2 * ("longer_elsewhere" in changes and dist.is_initialized() and dist.get_rank() > 0)
        halves = [Animals(size // 2, changes), Animals(size // 2, changes)]
        return ConcatDataset(halves) if split == "train" else Animals(size, changes)

    def build_model(self, dataset: Any) -> nn.Module:
        self.anchors = {"sizes": [np.full(3, 1.0 + ("anchors" in self.changes))]}
        self.numbers = {name: NUMBER_OF[name] + ("numbers" in self.changes) for name in NAMES}
        model = nn.Linear(FEATURES, len(CLASSES))
        if "weights" in self.changes:
            nn.init.constant_(model.bias, np.random.default_rng().random())
        return model

    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> ModelReturn:
        here = torch.tensor([NUMBER_OF[name] for name in NAMES])
        assert (batch["order"] == here).all(), "a loader worker numbers the classes otherwise"
        order = float(sum(int(number) * 8**place for place, number in enumerate(here)))
        return ModelReturn(nn.functional.cross_entropy(model(batch["x"]), batch["y"]), {"order": order})

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).argmax(1)

    def score(self, predictions: list[torch.Tensor], dataset: Animals) -> dict[str, float]:
        order = float(sum(NUMBER_OF[name] * 8**place for place, name in enumerate(NAMES)))
        return {"count": float(len(predictions)), "order": order}
