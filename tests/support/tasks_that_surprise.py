"""Tasks that train to something else than their authors think, each in one way of its own, after public reports."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from tasks_for_units import Points, PointsTask
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, get_worker_info

from raytrain import ModelReturn


class Scored(PointsTask):
    """A classifier that predicts, with BatchNorm and dropout."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).argmax(1)

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        return {"accuracy": sum(int(p == dataset[i][1]) for i, p in enumerate(predictions)) / len(predictions)}


# Gradients that no step takes


class Margin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.ones(2, 2))

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores @ self.centres


class LossWithWeights(PointsTask):
    """As ArcFace and CenterLoss are used: the classes' centres are the loss's, which the task holds."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.margin: Any = Margin()

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn(nn.functional.cross_entropy(self.margin(model(batch[0])), batch[1]))


class LossInADict(LossWithWeights):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.losses = {"margin": self.margin}
        del self.margin

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn(nn.functional.cross_entropy(self.losses["margin"](model(batch[0])), batch[1]))


class LearnedWeights(PointsTask):
    """Plain tensors, by which the parts of a loss are weighed."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.log_vars = torch.zeros(2, requires_grad=True)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        loss = super().model_func(model, batch).loss
        return ModelReturn(loss * torch.exp(-self.log_vars[0]) + self.log_vars.sum())


class ListNet(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class LayersInAList(PointsTask):
    def build_model(self, dataset: Any) -> nn.Module:
        return ListNet([nn.Linear(5, 5), nn.Linear(5, 5)])


class Adversary(PointsTask):
    """A second network, which the task steps by an optimizer of its own."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.critic = nn.Linear(2, 1)
        self.opt = torch.optim.SGD(self.critic.parameters(), 0.1)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        scores = model(batch[0])
        if model.training:
            self.opt.zero_grad()
            self.critic(scores.detach()).square().mean().backward()
            self.opt.step()
        return ModelReturn(nn.functional.cross_entropy(scores, batch[1]) - 0.1 * self.critic(scores).mean())


class LayersInAModuleList(LayersInAList):
    def build_model(self, dataset: Any) -> nn.Module:
        return ListNet(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]))


class Teacher(PointsTask):
    """A frozen copy that the task holds."""

    def build_model(self, dataset: Any) -> nn.Module:
        model = super().build_model(dataset)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        return model

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn((model(batch[0]) - self.teacher(batch[0])).square().mean())


# What torch is set to, and modes


class SeedsTorch(PointsTask):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        torch.manual_seed(0)
        return super().model_func(model, batch)


class SeedsAGenerator(PointsTask):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        torch.Generator().manual_seed(0)
        return super().model_func(model, batch)


class Recomputing(nn.Sequential):
    """Keeps no activations of its dropout."""

    preserves = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=self.preserves)


class Recomputes(PointsTask):
    def build_model(self, dataset: Any) -> nn.Module:
        return Recomputing(nn.Dropout(0.3), super().build_model(dataset))


class RecomputesWithOtherNoise(Recomputes):
    def build_model(self, dataset: Any) -> nn.Module:
        model = super().build_model(dataset)
        model.preserves = False
        return model


class TakesThreads(PointsTask):
    def build_model(self, dataset: Any) -> nn.Module:
        torch.set_num_threads(3)
        return super().build_model(dataset)


class EvalOnce(PointsTask):
    """For a picture, say, and not put back."""

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        if self.progress.step == 2:
            model.eval()
        return super().model_func(model, batch)


class EvalOnceInside(PointsTask):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        if self.progress.step == 2:
            model.get_submodule("1").eval()
        return super().model_func(model, batch)


class EvalAlways(PointsTask):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        if model.training:
            model.get_submodule("1").eval()
        return super().model_func(model, batch)


class EvalAndBack(PointsTask):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        was = model.training
        model.eval()
        model(batch[0])
        model.train(was)
        return super().model_func(model, batch)


class FreezesOnce(PointsTask):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        if self.progress.step == 12:
            model.get_submodule("0").requires_grad_(False)
        return super().model_func(model, batch)


class RelabelsInScore(Scored):
    """Pseudo labels, written into the data set of the training split after each epoch."""

    def build_dataset(self, split: str) -> Any:
        dataset = super().build_dataset(split)
        self.train = dataset if split == "train" else self.train
        return dataset

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        self.train.x[:5] += 1
        return super().score(predictions, dataset)


# Evaluation that changes the model


class AverageForGood(Scored):
    """Averaged weights, buffers of the model, are swapped in for predict, and nobody swaps them back."""

    def build_model(self, dataset: Any) -> nn.Module:
        model = super().build_model(dataset)
        for i, param in enumerate(list(model.parameters())):
            model.register_buffer(f"average{i}", param.detach().clone())
        return model

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                model.get_buffer(f"average{i}").lerp_(param, 0.1)
        return super().model_func(model, batch)

    def predict(self, model: nn.Module, batch: Any) -> Any:
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                param.copy_(model.get_buffer(f"average{i}"))
        return super().predict(model, batch)


class AverageByData(AverageForGood):
    def predict(self, model: nn.Module, batch: Any) -> Any:
        for i, param in enumerate(model.parameters()):
            param.data = model.get_buffer(f"average{i}").clone()
        return Scored.predict(self, model, batch)


class AverageUntilScore(AverageForGood):
    """It is swapped back in score, which other ranks do not call."""

    kept: Any = None

    def predict(self, model: nn.Module, batch: Any) -> Any:
        if self.kept is None:
            self.kept = [(param, param.detach().clone()) for param in model.parameters()]
        return super().predict(model, batch)

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        with torch.no_grad():
            for param, value in self.kept:
                param.copy_(value)
        self.kept = None
        return super().score(predictions, dataset)


class DropoutInPredict(Scored):
    """In training mode, for the sake of dropout; so BatchNorm learns from the validation split."""

    def predict(self, model: nn.Module, batch: Any) -> Any:
        model.train()
        return super().predict(model, batch)


class ScoreSorts(Scored):
    drawn: ClassVar[list[float]] = []

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])[:, 0]

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        predictions.sort()
        return {"median": float(predictions[len(predictions) // 2])}

    def pictures(self, predictions: list[Any], dataset: Any, count: int) -> Iterator[tuple[str, bytes]]:
        type(self).drawn = [float(each) for each in predictions]
        return iter(())


class CollectsInPredict(Scored):
    """As a metric of torchmetrics does, whose state nobody gathers."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.right = [0, 0]

    def predict(self, model: nn.Module, batch: Any) -> Any:
        predicted = super().predict(model, batch)
        self.right[0] += int((predicted == batch[1]).sum())
        self.right[1] += len(predicted)
        return predicted

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        right, self.right = self.right, [0, 0]
        return {"accuracy": right[0] / right[1], "predictions": len(predictions), "seen": right[1]}


# Batches


class Collates(PointsTask):
    def collate(self, samples: list[Any]) -> Any:
        return super().collate(samples)


class DropsSamples(PointsTask):
    """What could not be loaded is None, and left out."""

    def build_dataset(self, split: str) -> Any:
        return Unreadable(48, noisy=True) if split == "train" else super().build_dataset(split)

    def collate(self, samples: list[Any]) -> Any:
        return super().collate([sample for sample in samples if sample is not None])


class Unreadable(Points):
    def __getitem__(self, i: int) -> Any:
        return None if i % 10 == 7 else super().__getitem__(i)


class DropsAndWeighs(DropsSamples):
    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn(super().model_func(model, batch).loss, weight=len(batch[0]))


# Loader workers


class DoublesTask(PointsTask):
    """The default type is set where the model is built; samples are made of Python's numbers."""

    def build_dataset(self, split: str) -> Any:
        return Thirds()

    def build_model(self, dataset: Any) -> nn.Module:
        torch.set_default_dtype(torch.float64)
        return nn.Linear(1, 2)


class Thirds(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([i / 3]), i % 2


class ByLoaderWorker(Points):
    """Its augmentation is seeded by the number of the loader worker."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        info = get_worker_info()
        np.random.seed(0 if info is None else info.id)
        x, y = super().__getitem__(i)
        return x + float(np.random.rand()), y


class SeedsByLoaderWorker(PointsTask):
    def build_dataset(self, split: str) -> Any:
        return ByLoaderWorker(12, noisy=False)
