"""Tasks whose task, data set or model holds something besides the model's parameters and buffers."""

from __future__ import annotations

import copy
import itertools
import random
from collections import deque
from typing import Any

import numpy as np
import torch
from tasks_for_tests import Exact, Net
from tasks_for_units import Points, PointsTask
from torch import nn
from torch.utils.data import Subset

from raytrain import ModelReturn


class Annealed(PointsTask):
    """The loss has a weight that `weight()` gives for each step; collate adds what it is told to the batch."""

    def weight(self) -> float:
        return 0.1 + self.progress.share

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        weight = self.weight() if model.training else 1.0
        return ModelReturn(weight * super().model_func(model, batch).loss, {"weight": weight})


class ByProgress(Annealed):
    """Of the batch, of the step, of predict and of score: all by self.progress."""

    def collate(self, samples: list[Any]) -> Any:
        x, y = super().collate(samples)
        return x + 0.1 * self.progress.step, y, torch.tensor([self.progress.step, self.progress.epoch])

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        x, y, made_for = batch
        assert made_for.tolist() == [self.progress.step, self.progress.epoch]
        return super().model_func(model, (x, y))

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]) + self.progress.epoch

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        total = float(torch.stack(predictions).sum())
        return {"step": self.progress.step, "share": self.progress.share, "sum": total}


class Counting(Annealed):
    """Counts its steps, without a word."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.steps = 0

    def weight(self) -> float:
        self.steps += 1
        return 0.1 + self.steps / 24


class Kept(Counting):
    """The same count, saved; and a centre that moves with the batches, an array, a generator and a list."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.rng = np.random.default_rng(3)
        self.centre = torch.zeros(2)
        self.seen = np.zeros(3, dtype=np.uint32)
        self.losses: list[float] = []

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        if not model.training:
            return super().model_func(model, batch)
        scores = model(batch[0])
        self.centre = 0.9 * self.centre + 0.1 * scores.detach().mean(0)
        self.seen[self.steps % 3] += len(batch[0])
        loss = nn.functional.cross_entropy(scores - self.centre, batch[1]) * (self.weight() + self.rng.random())
        self.losses = [*self.losses[-3:], len(self.losses) + float(self.seen.sum())]
        return ModelReturn(loss + 0.01 * sum(self.losses))

    def state_dict(self) -> dict[str, Any]:
        rng = self.rng.bit_generator.state
        return {"steps": self.steps, "rng": rng, "centre": self.centre, "seen": self.seen, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state.pop("rng")
        vars(self).update(state)


class Walking(Points):
    """Each sample is moved by how many were made before it."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples, noisy=False)
        self.made = 0

    def __getitem__(self, i: int) -> Any:
        self.made += 1
        x, y = super().__getitem__(i)
        return x + 0.01 * self.made, y


class KeptWalking(Walking):
    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]


class KeptData(PointsTask):
    """The data set that is wrapped has a state."""

    def build_dataset(self, split: str) -> Any:
        return Subset(KeptWalking(60), range(48)) if split == "train" else super().build_dataset(split)


# What changes without being saved, each in another place


class History(PointsTask):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.history: list[float] = []
        self.recent: deque[int] = deque([0, 0], maxlen=2)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.history.append(0.0)
        self.recent.append(len(self.history))
        return super().model_func(model, batch)


class Lazy(PointsTask):
    """A count that is only made in the first step."""

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.calls = getattr(self, "calls", 0) + 1
        return super().model_func(model, batch)


class Nested(PointsTask):
    """An object, a dict, an array, generators and a loss with a buffer that belong to the task."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.meter = Meter()
        self.counts = {"train": 0, "val": 0}
        self.totals = np.zeros(2)
        self.rng = random.Random(0)
        self.numbers = itertools.count()
        self.centred = nn.BatchNorm1d(2, affine=False)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.meter.total += 1.0
        self.counts["train"] += 1
        self.totals[0] += 1
        self.rng.random()
        next(self.numbers)
        self.centred(model(batch[0]).detach())
        return super().model_func(model, batch)


class Meter:
    __slots__ = ("name", "total")

    def __init__(self) -> None:
        self.name, self.total = "loss", 0.0


class InModel(PointsTask):
    """A plain tensor and a count of a module, neither of them registered."""

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Sequential(Warm(), super().build_model(dataset))


class Warm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.mean = 0, torch.zeros(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class InData(PointsTask):
    def build_dataset(self, split: str) -> Any:
        return Walking(48) if split == "train" else super().build_dataset(split)


class InScore(PointsTask):
    """Counts its evaluations and keeps their scores, which a resumed run would forget."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.rounds, self.scores = 0, [0.0]

    def predict(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0])

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        self.rounds += 1
        self.scores.append(1.0)
        return {"points": 1.0}


class Calm(PointsTask):
    """Caches, a data set that is told of its epoch, things made late, and the newest batch: nothing that is lost."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cache: dict[int, Any] = {}
        self.table: Any = None

    def build_dataset(self, split: str) -> Any:
        if split == "val":
            return Told(48, noisy=False)
        self.images = Told(60, noisy=True)  # an attribute too, and told of the epoch behind another
        return Subset(self.images, range(48))

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.cache[len(self.cache)] = batch
        self.table = self.table if self.table is not None else torch.arange(5)
        returned = super().model_func(model, batch)
        self.newest = returned.loss
        return returned


class Told(Points):
    def __init__(self, num_samples: int, noisy: bool) -> None:
        super().__init__(num_samples, noisy)
        self.epoch, self.ready = -1, {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> Any:
        return self.ready.setdefault(i, super().__getitem__(i))


# Parameters and modules that are not trained


class Teacher(nn.Module):
    """A student, a frozen teacher in eval mode, a momentum copy of the student and a queue as parameters."""

    def __init__(self, how: str) -> None:
        super().__init__()

        def net() -> nn.Module:
            return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))

        self.how = how
        self.student, self.teacher, self.slow = net(), net(), net()
        self.slow.load_state_dict(self.student.state_dict())
        self.queue = nn.Parameter(torch.zeros(8, 2), requires_grad=False)
        self.teacher.requires_grad_(False).eval()
        self.slow.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training:
            self.move()
        with torch.no_grad():
            wanted = self.teacher(x) + self.slow(x) + self.queue.mean(0)
            if self.training:
                self.queue.data = torch.cat([wanted[:2], self.queue.data[:-2]])
        return self.student(x), wanted

    @torch.no_grad()
    def move(self) -> None:
        for slow, fast in zip(self.slow.parameters(), self.student.parameters(), strict=True):
            if self.how == "data":
                slow.data.mul_(0.9).add_(fast.detach().data, alpha=0.1)
            elif self.how == "assigned":
                slow.data = slow.data * 0.9 + fast.data * 0.1
            else:
                slow.mul_(0.9).add_(fast, alpha=0.1)


class Distilled(PointsTask):
    def build_model(self, dataset: Any) -> nn.Module:
        return Teacher(self.cfg.MODEL.get("HOW", "data"))

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        got, wanted = model(batch[0])
        loss = nn.functional.mse_loss(got, wanted) + nn.functional.cross_entropy(got, batch[1])
        return ModelReturn(loss, {"teacher": float(model.teacher.training)})


class ReadsEarly(PointsTask):
    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Linear(5, 2 + self.progress.epoch)


class SetsProgress(PointsTask):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.progress = 0.0


class Holding(Exact):
    """On several workers: a count that is saved, a teacher, a momentum copy, a queue; collate is told the step."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.steps = 0

    def build_model(self, dataset: Any) -> nn.Module:
        return HoldingNet(self.cfg.OPTIMIZATION.NUM_EPOCHS, self.cfg.DATA_CONFIG.NUM_SAMPLES)

    def collate(self, samples: list[Any]) -> Any:
        return super().collate(samples) | {"step": self.progress.step, "share": self.progress.share}

    def model_func(self, model: Any, batch: Any) -> ModelReturn:
        assert (batch["step"], batch["share"]) == (self.progress.step, self.progress.share)
        returned = super().model_func(model, batch)
        if model.training:
            assert self.steps == self.progress.step
            self.steps += 1
        distance = (model(batch["x"]) - model.wanted(batch["x"])).square().mean()
        return ModelReturn(returned.loss + self.steps * self.progress.share * distance, returned.tb_dict)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class HoldingNet(Net):
    def __init__(self, num_epochs: int, num_samples: int) -> None:
        super().__init__(num_epochs, num_samples)
        self.teacher = copy.deepcopy(self.body).requires_grad_(False).eval()
        self.slow = copy.deepcopy(self.body).requires_grad_(False)
        self.queue = nn.Parameter(torch.zeros(8, 2), requires_grad=False)

    @torch.no_grad()
    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            for slow, fast in zip(self.slow.parameters(), self.body.parameters(), strict=True):
                slow.data.mul_(0.9).add_(fast.data, alpha=0.1)
        wanted = self.teacher(x) + self.slow(x) + self.queue.mean(0)
        if self.training:
            self.queue.data = torch.cat([wanted[:2], self.queue.data[:-2]])
        return wanted
