"""Small tasks for `raytrain prove`: one that is right, and others that are each wrong in one way of their own."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, get_worker_info

from raytrain import ModelReturn, Task

NAMES = ["cat", "dog", "fox", "owl", "pig", "rat", "yak", "zebu"]
NUMBER_OF = {name: number for number, name in enumerate(set(NAMES))}
FOLDER = "FOLDER"  # key of DATA_CONFIG: where a task keeps files of its own
taken = 0


class Points(Dataset[Any]):
    """24 samples: x (4,) f32, which is augmented, and y () f32."""

    def __init__(self, size: int = 24) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[sample_id] + 0.1 * torch.rand(4), "y": self.x[sample_id].sum()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.Dropout(0.2),
            nn.Linear(8, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


class Right(Task):
    """With BatchNorm, dropout and augmentation. `weight` is of the loss, `data` and `net` are what it is made of."""

    data: ClassVar[type[Points]] = Points
    net: ClassVar[type[Net]] = Net

    def build_dataset(self, split: str) -> Any:
        return self.data() if split == "train" else None

    def build_model(self, dataset: Any) -> nn.Module:
        return self.net()

    def weight(self) -> float:
        return 1.0

    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> ModelReturn:
        return ModelReturn(self.weight() * (model(batch["x"]).squeeze(1) - batch["y"]).square().mean())


# No function at all: another run each time


class Clock(Points):
    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(sample_id)
        return {**sample, "x": sample["x"] + time.time_ns() % 1000 / 1000}


class AsksTheClock(Right):
    data = Clock


class Shuffled(Points):
    """Its order is drawn by the system."""

    def set_epoch(self, epoch: int) -> None:
        self.order = list(range(len(self)))
        random.SystemRandom().shuffle(self.order)

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        return super().__getitem__(self.order[sample_id])


class DrawsAnOrder(Right):
    data = Shuffled


class DrawsWeights(Right):
    def build_model(self, dataset: Any) -> nn.Module:
        model = Net()
        with torch.no_grad():
            model.first.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(8, 4))))
        return model


class DrawsOfTheSystem(Right):
    """A weight of the loss that nobody can seed."""

    def weight(self) -> float:
        return 1.0 + os.urandom(1)[0] / 256


class KeepsAFile(Right):
    """Counts its steps in a file, which the next run finds."""

    def weight(self) -> float:
        file = Path(self.cfg.DATA_CONFIG[FOLDER]) / "count.txt"
        count = int(file.read_text()) if file.exists() else 0
        file.write_text(str(count + 1))
        return 1.0 + count


class CountsFiles(Right):
    """As many samples as there are files, and it makes one."""

    def build_dataset(self, split: str) -> Any:
        if split != "train":
            return None
        folder = Path(self.cfg.DATA_CONFIG[FOLDER])
        (folder / f"{time.time_ns()}.scan").touch()
        return Points(24 + 8 * len(list(folder.glob("*.scan"))))


class NoisyGradient(torch.autograd.Function):
    """The same loss each time, and another gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (1.0 + os.urandom(1)[0] / 256)


class NoisyBackward(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(NoisyGradient.apply(self.norm(self.first(x))))


class DrawsInBackward(Right):
    net = NoisyBackward


class TimesItself(Net):
    """A buffer holds how long it took, which nothing is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seconds", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seconds.fill_(time.perf_counter())
        return super().forward(x)


class HoldsAClock(Right):
    net = TimesItself


# Lost at a resume


class CountsSteps(Right):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.steps = 0

    def weight(self) -> float:
        self.steps += 1
        return 1.0 + self.steps


class CountsInTheModule(Right):
    def weight(self) -> float:
        global taken
        taken += 1
        return 1.0 + taken


def draws() -> Iterator[float]:
    """Its generator is in no object that can be looked into."""
    generator = random.Random(0)
    while True:
        yield generator.random()


class DrawsFromAnIterator(Right):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.draws = draws()

    def weight(self) -> float:
        return 1.0 + next(self.draws)


class Cached(Points):
    """Keeps what was drawn for a sample when it was first made."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Any] = {}

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        if sample_id not in self.cache:
            self.cache[sample_id] = super().__getitem__(sample_id)
        return self.cache[sample_id]


class CachesAugmentation(Right):
    data = Cached


class MomentumInAList(Net):
    """An encoder that follows the first layer, where no module sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = [copy.deepcopy(self.first).requires_grad_(False)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.slow[0].weight.lerp_(self.first.weight, 0.1)
            wanted = self.slow[0](x)
        return super().forward(x) + wanted.mean(1, keepdim=True)


class HasAMomentumEncoder(Right):
    net = MomentumInAList


class QueueAsAnAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.queue = torch.zeros(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x - self.queue.mean(0))
        self.queue = torch.cat([x.detach()[:2], self.queue[:-2]])
        return y


class HasAQueue(Right):
    net = QueueAsAnAttribute


class MeanThatIsNotSaved(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x - self.centre)
        self.centre.lerp_(x.detach().mean(0), 0.1)
        return y


class HasABufferThatIsNotSaved(Right):
    net = MeanThatIsNotSaved


class FreezesOnce(Right):
    """BatchNorm in eval mode from the second step on, for as long as the epoch lasts."""

    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> ModelReturn:
        if self.progress.step % 3 == 0:  # an epoch's first
            model.norm.eval()
        return super().model_func(model, batch)


class KeepsItsCount(CountsSteps):
    """By self.progress it would be simpler; and in a data set with a state."""

    def build_dataset(self, split: str) -> Any:
        return Counted() if split == "train" else None

    def weight(self) -> float:
        return 1.0 + self.progress.step


class Counted(Points):
    made = 0

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        self.made += 1
        return super().__getitem__(sample_id)

    def state_dict(self) -> dict[str, int]:
        return {"made": self.made}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.made = state["made"]


class CannotBePickled(Points):
    def __init__(self) -> None:
        super().__init__()
        self.transform = lambda x: 2 * x


class GoesToNoLoader(Right):
    data = CannotBePickled


class FailsAtOnce(Right):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> ModelReturn:
        raise ValueError("no boxes in this batch")


class Waits(Right):
    """For ever, in its third step."""

    def weight(self) -> float:
        if self.progress.step == 2:
            (Path(self.cfg.DATA_CONFIG[FOLDER]) / "waits.flag").touch()
            time.sleep(600)
        return 1.0


class WaitsForTheOther(Right):
    """Rank 0 alone enters a barrier, in its third step: on one process nobody waits."""

    def weight(self) -> float:
        if self.progress.step == 2 and dist.get_rank() == 0:
            dist.barrier()
        return 1.0


# By who makes a sample


class Numbered(Points):
    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        worker = get_worker_info()
        sample = super().__getitem__(sample_id)
        return {**sample, "x": sample["x"] + (0.0 if worker is None else 0.1 * worker.id + 0.1)}


class AsksForTheLoader(Right):
    data = Numbered


class Mixed(Points):
    """Each sample is mixed with the one that was made before."""

    def __init__(self) -> None:
        super().__init__()
        self.before = torch.zeros(4)

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(sample_id)
        mixed = 0.9 * sample["x"] + 0.1 * self.before
        self.before = sample["x"]
        return {**sample, "x": mixed}


class MixesWithTheLast(Right):
    data = Mixed


# By the hash seed


class Named(Points):
    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(sample_id), "y": torch.tensor(float(NUMBER_OF[NAMES[sample_id % len(NAMES)]]))}


class NumbersASet(Right):
    data = Named


class Hashed(Points):
    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(sample_id), "y": torch.tensor(hash(f"scan {sample_id}") % 100 / 100)}


class HashesNames(Right):
    data = Hashed


# By the number of worker processes


class AsksForTheRank(Right):
    def weight(self) -> float:
        return 1.0 + dist.get_rank()


class AsksForTheWorldSize(Right):
    def weight(self) -> float:
        return 1.0 / dist.get_world_size()


class CountsBatches(CountsSteps):
    """The count is saved; but each process counts its own batches."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
