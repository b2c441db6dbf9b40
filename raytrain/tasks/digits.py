"""The tutorial task: 1,797 handwritten digits of 8 x 8 pixels, and a small conv net that reads them.

Data: the test part of the UCI "Optical Recognition of Handwritten Digits" set, which scikit-learn ships.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from raytrain.errors import ConfigError, TaskError
from raytrain.task import ModelReturn, Task

if TYPE_CHECKING:
    from raytrain.config.sections import Config

NUM_CLASSES = 10
NUM_HELD_OUT = 359  # a fifth of 1,797
SPLIT_SEED = 0  # not the run's SEED: every run is scored on the same images


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """MODEL: channels of the first convolution (the others have twice as many); dropout before the classifier."""

    WIDTH: int = 16
    DROPOUT: float = 0.3

    def __post_init__(self) -> None:
        if self.WIDTH < 1:
            raise ConfigError(f"MODEL.WIDTH is {self.WIDTH}; it must be at least 1")
        if not 0 <= self.DROPOUT < 1:
            raise ConfigError(f"MODEL.DROPOUT is {self.DROPOUT}; it must be at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """DATA_CONFIG: how far a training image is moved, at most, to each side: pixels and degrees."""

    SHIFT: float = 0.5
    ROTATION_DEG: float = 10.0

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            if value < 0:
                raise ConfigError(f"DATA_CONFIG.{key} is {value}; it must not be negative")


Options = TypeVar("Options", ModelOptions, DataOptions)


def read_options(section: str, found: Mapping[str, Any], options: type[Options]) -> Options:
    """`options` filled from the config's `section`; ConfigError names what does not belong there."""
    defaults = dataclasses.asdict(options())
    for key, value in found.items():
        if key not in defaults:
            near = difflib.get_close_matches(str(key).upper(), defaults, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the digits task knows {', '.join(defaults)}"
            raise ConfigError(f"{section}.{key} is unknown; {hint}")
        whole = isinstance(defaults[key], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{section}.{key} is {value!r}; it must be a {'whole ' if whole else ''}number")
    return options(**found)


def load_digits() -> tuple[Tensor, Tensor]:
    """All digits: images (1797, 1, 8, 8) float32 in 0..1, and labels (1797,) int64."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise TaskError(
            'the digits come with scikit-learn, which is not here; get it with: pip install "raytrain[digits]"'
        )
    # As sklearn.datasets.load_digits does, which takes each process 2 s to import.
    table = np.loadtxt(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, labels = table[:, :-1], table[:, -1]
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return images, torch.as_tensor(labels, dtype=torch.int64)


class Digits(Dataset[dict[str, Tensor]]):
    """Samples {"image": (1, 8, 8) float32, "label": () int64}; each image is moved at random if `moves` is given.

    images: (N, 1, 8, 8) float32.   labels: (N,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor, moves: DataOptions | None = None) -> None:
        self.images = images
        self.labels = labels
        self.moves = moves

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        return {"image": moved_at_random(image, self.moves) if self.moves else image, "label": self.labels[index]}


def moved_at_random(image: Tensor, moves: DataOptions) -> Tensor:
    """`image` (1, 8, 8), turned about its middle and shifted by draws from torch's generator; black comes in."""
    turn, down, right = (torch.rand(3) * 2 - 1).tolist()
    angle_rad = math.radians(turn * moves.ROTATION_DEG)
    pixel = 2 / image.shape[-1]  # affine_grid's image is 2 wide
    theta = torch.tensor(
        [
            [math.cos(angle_rad), -math.sin(angle_rad), right * moves.SHIFT * pixel],
            [math.sin(angle_rad), math.cos(angle_rad), down * moves.SHIFT * pixel],
        ]
    )
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)  # (1, 8, 8, 2)
    return F.grid_sample(image[None], grid, align_corners=False)[0]  # (1, 8, 8)


class DigitNet(nn.Sequential):
    """(B, 1, 8, 8) images -> (B, 10) logits. 19,258 parameters at WIDTH 16."""

    def __init__(self, options: ModelOptions) -> None:
        width = options.WIDTH
        super().__init__(
            *convolution(1, width),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),  # (B, 2 * width, 4, 4)
            *convolution(2 * width, 2 * width),
            nn.Flatten(),
            nn.Dropout(options.DROPOUT),
            nn.Linear(2 * width * 4 * 4, NUM_CLASSES),
        )


def convolution(num_in: int, num_out: int) -> list[nn.Module]:
    return [nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU()]


class DigitsTask(Task):
    """Which digit is it? Scored by accuracy on a held-out fifth that no seed changes."""

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.model_options = read_options("MODEL", cfg.MODEL, ModelOptions)
        self.data_options = read_options("DATA_CONFIG", cfg.DATA_CONFIG, DataOptions)

    def build_dataset(self, split: str) -> Digits:
        images, labels = load_digits()
        # RandomState, whose streams NumPy has frozen: default_rng's may change with a release.
        order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(labels)))
        if split == "train":
            ids, moves = order[NUM_HELD_OUT:], self.data_options
        else:
            ids, moves = order[:NUM_HELD_OUT], None
        return Digits(images[ids], labels[ids], moves)

    def build_model(self, dataset: Any) -> nn.Module:
        return DigitNet(self.model_options)

    def model_func(self, model: nn.Module, batch: dict[str, Tensor]) -> ModelReturn:
        logits = model(batch["image"])  # (B, 10)
        hits = (logits.argmax(dim=1) == batch["label"]).float()
        return ModelReturn(F.cross_entropy(logits, batch["label"]), tb_dict={"accuracy": hits.mean().detach()})

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The most likely digit of each image: (B,) int64."""
        return model(batch["image"]).argmax(dim=1)

    def score(self, predictions: list[Any], dataset: Digits) -> dict[str, float]:
        hits = [int(digit) == label for digit, label in zip(predictions, dataset.labels.tolist(), strict=True)]
        return {"accuracy": sum(hits) / len(hits)}
