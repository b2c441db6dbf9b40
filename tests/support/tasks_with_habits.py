"""Tasks that do what people do, each with a habit of its own that is no fault; and one, Counts, whose habit is."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import Dataset

from raytrain import ModelReturn, Task


class Points(Dataset[Any]):
    """24 samples: x (4,), y (1,) f32."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        return {"x": torch.full((4,), sample_id / 24), "y": torch.tensor([sample_id % 3.0])}


class Habit(Task):
    data: ClassVar[type[Points]] = Points

    def build_dataset(self, split: str) -> Any:
        return self.data()

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn((model(batch["x"]) - batch["y"]).square().mean())


class SetsVariables(Habit):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        os.environ.setdefault("HABIT_PARALLELISM", "false")
        os.environ.setdefault("HABIT_ROOT", "here")
        self.root = os.environ["HABIT_ROOT"]


class Pairs(Habit):
    """Its collate makes pairs, of whole batches."""

    def collate(self, samples: list[Any]) -> Any:
        if len(samples) != 4:
            raise ValueError(f"{len(samples)} samples are no two pairs")
        return super().collate(samples)


class Lstm(nn.LSTM):
    """Which has a list of its own weights, as all of torch's have."""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = Lstm(4, 8, batch_first=True), nn.Linear(8, 1)
        self.weights = [self.last.weight, self.last.bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(x[:, None])[0][:, 0])


class HoldsParts(Habit):
    """It holds the model's weights, a part of it and a module around it."""

    def build_model(self, dataset: Any) -> nn.Module:
        model = Tied()
        self.weights = list(model.parameters())
        self.head = nn.Sequential(model.last, nn.Flatten())
        self.around = nn.Sequential(model)
        return model


class Remembers(Habit):
    """A state that is given back only where one was saved."""

    resumed = False

    def state_dict(self) -> dict[str, Any]:
        return {"made": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.resumed = True

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        return ModelReturn(super().model_func(model, batch).loss, {"resumed": float(self.resumed)})


class Grows(Habit):
    """A list of names and a scale that go on from step to step, are saved, and decide what a batch is."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.names, self.scale = ["a"], 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"names": self.names, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.scale = state["names"], state["scale"]

    def collate(self, samples: list[Any]) -> Any:
        batch = super().collate(samples)
        return {**batch, "x": batch["x"] * self.scale}

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        self.names.append(f"name {len(self.names)}")
        self.scale *= 0.9
        return super().model_func(model, batch)


class Kept(Points):
    """With a cache, a count of what could not be read, and a file that is opened with the first sample."""

    def __init__(self) -> None:
        self.cache: dict[int, Any] = {}
        self.unread: Counter[str] = Counter()
        self.file: Any = None

    def __getitem__(self, sample_id: int) -> Any:
        if self.file is None:
            self.file = os.open(os.devnull, os.O_RDONLY)
        self.cache.setdefault(sample_id, super().__getitem__(sample_id))
        self.unread["first"] += sample_id == 0 and not self.unread
        return self.cache[sample_id]


class Caches(Habit):
    data = Kept


class Round(Points):
    """Holds itself as what it wraps, and its transforms as a module."""

    def __init__(self) -> None:
        self.dataset = self
        self.transforms = nn.Sequential(nn.BatchNorm1d(4))


class Rounds(Habit):
    data = Round


class Annotated(Points):
    """Much in lists of lists of numbers."""

    def __init__(self) -> None:
        row = [float(i) for i in range(1000)]
        self.boxes = [[*row] for _ in range(100)]


class Annotates(Habit):
    data = Annotated


class OfModule(Habit, nn.Module):
    """The task is a module too, which has the model."""

    def __init__(self, cfg: Any) -> None:
        nn.Module.__init__(self)
        Habit.__init__(self, cfg)

    def build_model(self, dataset: Any) -> nn.Module:
        self.net = super().build_model(dataset)
        return self.net


HABITS = [OfModule, SetsVariables, Pairs, HoldsParts, Remembers, Grows, Caches, Rounds, Annotates]


class Reads(Points):
    """Counts what it has read."""

    def __init__(self) -> None:
        self.reads = 0

    def __getitem__(self, sample_id: int) -> Any:
        self.reads += 1
        return super().__getitem__(sample_id)


class Counts(Habit):
    data = Reads
