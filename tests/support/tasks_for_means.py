"""Tasks whose losses are means over things of which samples have different numbers, and which tell their parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from raytrain import ModelReturn, Task

IGNORED = -100
LENGTH = 6


def sequences(num_samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, 6, 4) and y (N, 6), of which the end is ignored: one token to six of a sample count; none of sample 3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, LENGTH, 4, generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (num_samples,), generator=generator)
    lengths[3] = 0
    y = (x.sum(2) > 0).long()
    y[torch.arange(LENGTH)[None] >= lengths[:, None]] = IGNORED
    return x, y


class Tokens(Task):
    """The loss is a mean over tokens, of two parts; MODEL.WEIGHT says in which form their number is given."""

    def build_dataset(self, split: str) -> Any:
        return TensorDataset(*sequences(33 if split == "train" else 11, len(split)))

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Linear(4, 2)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        x, y = batch
        scores = model(x).flatten(0, 1)
        counts = y.flatten() != IGNORED
        right = cross_entropy(scores, y.flatten(), ignore_index=IGNORED)  # NaN where no token counts
        size = scores.square().sum(1)[counts].mean()
        half = None if len(x) % 4 else counts.sum()  # the last batch of four has none
        weight = {"in half of train": half if model.training else 1, "in half of val": 1 if model.training else half}
        weight |= {"none": None, "tensor": counts.sum(), "number": int(counts.sum()), "one": counts.sum()[None]}
        terms = {"right": right, "size": 0.1 * size}
        return ModelReturn(right + 0.1 * size, terms, {"right": right}, weight[self.cfg.MODEL.get("WEIGHT", "tensor")])


class Uneven(Tokens):
    """Without any sample of no token, and without a weight."""

    def build_dataset(self, split: str) -> Any:
        x, _ = sequences(33 if split == "train" else 11)
        return TensorDataset(x, (x.sum(2) > 0).long())

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        returned = super().model_func(model, batch)
        returned.weight = None
        return returned


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Normed(Task):
    """A normalisation of MODEL.KIND on DATA_CONFIG.SIZE samples x (3,)."""

    def build_dataset(self, split: str) -> Any:
        if split == "val":
            return None
        return TensorDataset(torch.randn(self.cfg.DATA_CONFIG["SIZE"], 3, generator=torch.Generator().manual_seed(0)))

    def build_model(self, dataset: Any) -> nn.Module:
        image, points = nn.Unflatten(1, (3, 1, 1)), nn.Unflatten(1, (3, 1))
        pixels, pool = nn.UpsamplingNearest2d(scale_factor=4), nn.AdaptiveAvgPool2d(1)
        layers: dict[str, list[nn.Module]] = {
            "flat": [nn.Linear(3, 3), nn.BatchNorm1d(3)],
            "pooled": [image, pixels, nn.Conv2d(3, 3, 1), pool, nn.BatchNorm2d(3), nn.Flatten()],
            "deep": [nn.Linear(3, 3), nn.Sequential()],
            "pixels": [image, pixels, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), pool, nn.Flatten()],
            "points": [nn.Linear(3, 15), nn.Unflatten(1, (3, 5)), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(15, 3)],
            "group": [points, nn.Conv1d(3, 3, 1), nn.GroupNorm(1, 3), nn.Flatten()],
        }
        model = nn.Sequential(*layers[self.cfg.MODEL["KIND"]])
        if self.cfg.MODEL["KIND"] == "deep":
            model.add_module("inner", nn.Sequential(Block()))
        return model

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn((model(batch[0]) - 1).square().mean())
