"""Small tasks for the unit tests, imported by dotted path as a user's own are."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import raytrain
from raytrain import ModelReturn
from raytrain.batch import move_to

TOY = Path(__file__).parents[1] / "golden" / "toy"


class Draws(Dataset[Any]):
    """Sample i: its id, a draw of each generator, the epoch that it was told of, and the process that made it."""

    def __init__(self, num_samples: int, fails_at: int | None = None) -> None:
        self.num_samples, self.fails_at = num_samples, fails_at
        self.epoch = -1

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        if sample_id == self.fails_at:
            raise ValueError("this scan has no points")
        draws = np.array([random.random(), np.random.rand(), float(torch.rand(()))])
        return {"id": sample_id, "draws": draws, "epoch": self.epoch, "process": os.getpid()}


class DrawTask(raytrain.Task):
    """Batches of Draws; nothing is trained. A batch has a draw of collate too."""

    def collate(self, samples: list[Any]) -> dict[str, Any]:
        if any(sample["id"] == 1000 for sample in samples):
            raise KeyError("gt_boxes")
        return {
            "id": np.array([sample["id"] for sample in samples]),
            "draws": np.stack([sample["draws"] for sample in samples]),
            "epoch": [sample["epoch"] for sample in samples],
            "process": samples[0]["process"],
            "collated": torch.rand(()),
        }


class Forces(raytrain.Task):
    """A potential whose forces, the gradient by the positions, are what it is trained on and what it predicts."""

    eval_needs_grad = True

    def build_dataset(self, split: str) -> Any:
        x = torch.rand(16, 3, generator=torch.Generator().manual_seed(len(split)))
        return TensorDataset(x, -2 * x)

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forces(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return -torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn((self.forces(model, batch[0]) - batch[1]).square().mean())


class PredictedForces(Forces):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        return self.forces(model, batch[0])

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        assert not any(each.requires_grad for each in predictions), "each would hold its whole graph"
        return {"error": float((torch.stack(predictions) - dataset.tensors[1]).square().mean())}


class ForcesUnsaid(Forces):
    eval_needs_grad = False


class PredictedForcesUnsaid(PredictedForces):
    eval_needs_grad = False


class ToyNet(nn.Module):
    """The net of tests/golden/toy. x: (B, 2, 8, 8).   Returns logits (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6, eps=1e-3, momentum=0.01)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()  # (B, 6, 8, 8)
        x = self.bn2(self.conv2(x)).relu()  # (B, 8, 4, 4)
        return self.fc(x.mean((2, 3)))


class GoldenToyTask(raytrain.Task):
    """The run that OpenPCDet's own loop made in f64: seven batches of four, in the same order each epoch."""

    def build_dataset(self, split: str) -> Any:
        if split == "val":
            return None
        data = np.load(TOY / "data.npz")
        x, y = torch.from_numpy(data["x"]).double(), torch.from_numpy(data["y"])
        return TensorDataset(x.flatten(0, 1), y.flatten())

    def build_model(self, dataset: Any) -> nn.Module:
        net = ToyNet()
        net.load_state_dict({name: torch.from_numpy(value) for name, value in np.load(TOY / "init.npz").items()})
        return net.double()

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        x, y = batch
        loss = 8 * nn.functional.cross_entropy(model(x), y)
        return ModelReturn(loss, {"third": loss.detach() / 3}, {"size": len(x)})


class Points(Dataset[Any]):
    """x (5,) and y = sign of their sum; augmented by noise if `noisy`."""

    def __init__(self, num_samples: int, noisy: bool) -> None:
        self.x = torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(11))
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[i] + 0.1 * torch.rand(5) if self.noisy else self.x[i]
        return x, (self.x[i].sum() > 0).long()


class PointsTask(raytrain.Task):
    """A classifier with BatchNorm and dropout; evaluated by its loss."""

    def build_dataset(self, split: str) -> Any:
        return Points(48, noisy=True) if split == "train" else Points(23, noisy=False)

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        x, y = batch
        return ModelReturn(nn.functional.cross_entropy(model(x), y))


class ImagesTask(PointsTask):
    """A small net with convolutions and BatchNorm, on 48 images of noise: the last batch of an epoch is short."""

    def build_dataset(self, split: str) -> Any:
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(48 if split == "train" else 10, 2, 8, 8, generator=generator)
        return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())

    def build_model(self, dataset: Any) -> nn.Module:
        return ToyNet()


class OwnDeliveryTask(ImagesTask):
    """Its batches come in the line of the computation."""

    def to_device(self, batch: Any, device: torch.device) -> Any:
        return move_to(batch, device)


class FlagsTask(PointsTask):
    """Tells what torch was set to while it trained."""

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        tf32 = float(torch.backends.cuda.matmul.allow_tf32) + float(torch.backends.cudnn.allow_tf32)
        return ModelReturn(super().model_func(model, batch).loss, {"tf32": tf32})


class PredictingTask(PointsTask):
    """The same, evaluated by its predictions, which `score` wants in the data set's order."""

    def predict(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0])

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        logits = torch.stack(predictions)
        y = torch.stack([y for _, y in dataset])
        weights = torch.arange(1.0, len(y) + 1)  # another order gives another number
        return {"accuracy": ((logits.argmax(1) == y) * weights).sum() / weights.sum(), "first": logits[0, 0]}


class PartlyLeftOut(nn.Module):
    """`scale` stands on a module with children: OpenPCDet never trains such parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.scale * self.body(x))


class PartlyLeftOutTask(PredictingTask):
    def build_model(self, dataset: Any) -> nn.Module:
        return PartlyLeftOut()


class ScriptedTask(PointsTask):
    """The metric of each epoch as MODEL.SCORES says."""

    def build_dataset(self, split: str) -> Any:
        if split == "train":
            return Points(16, noisy=False)
        self.val = Draws(4)
        return self.val

    def predict(self, model: nn.Module, batch: Any) -> list[int]:
        return [0] * len(batch["id"])

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        assert dataset is self.val
        return {"points": self.cfg.MODEL.SCORES[dataset.epoch - 1]}


class SpoiltTask(PointsTask):
    """Its 6th forward pass has no finite loss."""

    passes = 0

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.passes += 1
        return ModelReturn(super().model_func(model, batch).loss * (float("nan") if self.passes == 6 else 1.0))


class PoisonedTask(PointsTask):
    """Its model writes a NaN into its own weights in step MODEL.STEP."""

    steps = 0

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.steps += 1
        if self.steps == self.cfg.MODEL.STEP:
            with torch.no_grad():
                model[4].bias.fill_(float("nan"))
        return super().model_func(model, batch)


class DiesInEvaluation(PredictingTask):
    """Rank 1 is killed while it evaluates, as by the system when memory runs out."""

    def predict(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(model, batch)


class FailsOnRank1(PointsTask):
    """Its model raises on rank 1 at step 7."""

    steps = 0

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.steps += model.training
        if self.steps == 7 and torch.distributed.get_rank() == 1:
            explode(batch[0])
        return super().model_func(model, batch)


class DiesOnRank1(PointsTask):
    """Its process ends on rank 1 at the third step that it takes, as if the system had killed it."""

    steps = 0

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.steps += model.training
        if self.steps == 3 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().model_func(model, batch)


def explode(x: torch.Tensor) -> None:
    raise RuntimeError(f"no anchors for {len(x)} points")


class ExitsTask(PointsTask):
    """Calls sys.exit(0) in its third step."""

    calls = 0

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.calls += 1
        if self.calls == 3:
            raise SystemExit(0)
        return super().model_func(model, batch)
