"""Data sets with generators of their own, wherever people keep them; and some that are no function of the sample id."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from tasks_for_tests import Exact, Points
from torch.utils.data import ConcatDataset, Dataset, StackDataset, Subset

import raytrain

OF_THE_MODULE = np.random.default_rng(1)


class Samples(Dataset[Any]):
    """22 samples: id and two draws (2,) f64."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, sample_id: int) -> tuple[int, Any]:
        return sample_id, np.array([self.draw(), self.draw()])

    def draw(self) -> float:
        raise NotImplementedError


class Numpys(Samples):
    def __init__(self, kind: Any = np.random.PCG64) -> None:
        self.rng = np.random.Generator(kind(42))

    def draw(self) -> float:
        return float(self.rng.normal())


class Legacy(Samples):
    """Its draws are three: numpy keeps every second Gaussian number for the next call."""

    def __init__(self) -> None:
        self.R = np.random.RandomState(42)

    def draw(self) -> float:
        return float(self.R.normal() + self.R.normal() / 8 + self.R.normal() / 64)


class Pythons(Samples):
    """A list of transforms in a dict."""

    def __init__(self) -> None:
        self.transforms = {"train": [random.Random(3), random.Random(3)]}

    def draw(self) -> float:
        return sum(each.random() for each in self.transforms["train"])


class Jitter:
    __slots__ = ("generator", "unset")

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self) -> float:
        return float(torch.rand((), generator=self.generator))


class Slotted(Samples):
    def __init__(self) -> None:
        self.transform = Jitter()

    def draw(self) -> float:
        return self.transform()


class Called(Samples):
    """A bound method of a generator, in a partial."""

    def __init__(self) -> None:
        self.transform = functools.partial(np.random.default_rng(4).uniform, -1.0, high=1.0)

    def draw(self) -> float:
        return self.transform()


class Closed(Samples):
    """A function that closes over its generator; it does not pickle."""

    def __init__(self) -> None:
        rng = random.Random(5)
        self.transform = lambda: rng.random()

    def draw(self) -> float:
        return self.transform()


class OfTheClass(Samples):
    rng = random.Random(6)

    def draw(self) -> float:
        return self.rng.random()


class OfTheModule(Samples):
    def draw(self) -> float:
        return float(OF_THE_MODULE.random())


class Lazy(Samples):
    """Its generator is made with the first sample, as one does that must not be pickled."""

    rng: np.random.Generator | None = None

    def draw(self) -> float:
        if self.rng is None:
            self.rng = np.random.default_rng()
        return float(self.rng.random())


class Renewed(Samples):
    def set_epoch(self, epoch: int) -> None:
        self.rng = np.random.default_rng(0)

    def draw(self) -> float:
        return float(self.rng.random())


class Albumentations:
    """The attributes that albumentations 2 documents of a transform; those in a Compose share its generators."""

    def __init__(self, transforms: tuple[Albumentations, ...] = ()) -> None:
        self.transforms = transforms
        self.set_random_seed(None)

    def set_random_seed(self, seed: int | None) -> None:
        self.set_random_state(np.random.default_rng(seed), random.Random(seed))

    def set_random_state(self, random_generator: np.random.Generator, py_random: random.Random) -> None:
        self.random_generator, self.py_random = random_generator, py_random
        for transform in self.transforms:
            transform.set_random_state(random_generator, py_random)

    def __call__(self) -> float:
        own = float(self.random_generator.random()) + self.py_random.random()
        return own + sum(transform() for transform in self.transforms)


class Albumented(Samples):
    def __init__(self) -> None:
        self.transform = Albumentations((Albumentations(), Albumentations()))

    def draw(self) -> float:
        return self.transform()


class Wrapper(Samples):
    """Hands on what it lacks, as wrappers do."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.base, name)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, sample_id: int) -> Any:
        return self.base[sample_id]


OWNERS: dict[str, Callable[[], Any]] = {
    "numpy's Generator": Numpys,
    "another bit generator": lambda: Numpys(np.random.Philox),
    "RandomState": Legacy,
    "random.Random, in a list, in a dict": Pythons,
    "torch's Generator, in __slots__": Slotted,
    "a bound method, in a partial": Called,
    "an attribute of the class": OfTheClass,
    "a global of the module": OfTheModule,
    "made with the first sample": Lazy,
    "made anew by set_epoch": Renewed,
    "albumentations": Albumented,
    "behind a Subset": lambda: Subset(Numpys(), range(22)),
    "behind a ConcatDataset": lambda: ConcatDataset([Subset(Numpys(), range(11)), Subset(Numpys(), range(11))]),
    "behind a wrapper": lambda: Wrapper(Numpys()),
}


class Together(Dataset[Any]):
    """The samples of several data sets side by side: many rows of a test in one set of loader workers."""

    def __init__(self, datasets: dict[str, Any]) -> None:
        self.datasets = datasets

    def __len__(self) -> int:
        return 22

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        return {name: dataset[sample_id] for name, dataset in self.datasets.items()}


# Those that are no function of the sample id


class MadeOnTheSpot(Samples):
    def draw(self) -> float:
        return float(np.random.default_rng().random())


class OfTheSystem(Samples):
    def draw(self) -> float:
        return random.SystemRandom().random()


class SeededByTheClock(Samples):
    def draw(self) -> float:
        np.random.seed(time.perf_counter_ns() & 0xFFFFFFFF)
        return float(np.random.rand())


class OfTheProcess(Samples):
    def draw(self) -> float:
        return float(int.from_bytes(os.urandom(4), "little"))


class Walking(Samples):
    """Takes what comes next, whatever it is asked for."""

    position = 0

    def draw(self) -> float:
        self.position += 1
        return float(self.position)


class WrittenInPlace(Samples):
    def __init__(self) -> None:
        self.cache = torch.zeros(22, 2)

    def __getitem__(self, sample_id: int) -> tuple[int, Any]:
        self.cache[sample_id] += torch.rand(2)
        return sample_id, self.cache[sample_id]


class Streamed(Samples):
    def __init__(self) -> None:
        self.stream: Iterator[int] = iter(range(1))

    def draw(self) -> float:
        return 0.0

    def __getitem__(self, sample_id: int) -> tuple[int, Any]:
        return sample_id, float(next(self.stream))


IMPURE: dict[type[Samples], str] = {
    MadeOnTheSpot: r"differs each time it is made, at \[1\]: it draws from a generator that cannot be seeded",
    OfTheSystem: r"differs each time it is made, at \[1\]: it draws from a generator that cannot be seeded",
    SeededByTheClock: r"differs each time it is made, at \[1\]: it draws from a generator that cannot be seeded",
    OfTheProcess: r"differs each time it is made, at \[1\]: it draws from a generator that cannot be seeded",
    Walking: r"differs each time it is made, at \[1\]: making it changes dataset.position",
    WrittenInPlace: r"differs each time it is made, at \[1\]: making it changes dataset.cache",
    Streamed: "can be made only once: the second time it fails: StopIteration",
}


# What is told of the epoch


class Told(Samples):
    """Sample i: the epochs that it was told of, and the order that set_epoch shuffles in place."""

    def __init__(self, num_samples: int = 22) -> None:
        self.num_samples, self.epochs, self.order = num_samples, list[int](), list(range(num_samples))
        self.rng = random.Random(8)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)
        random.shuffle(self.order)
        self.offset = self.rng.random() + float(np.random.rand()) + float(torch.rand(()))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample_id: int) -> tuple[int, Any]:
        return sample_id, np.array([*self.order, self.offset, *self.epochs[-1:], len(self.epochs)])


class Tells(Wrapper):
    """Tells what is behind it itself."""

    def set_epoch(self, epoch: int) -> None:
        self.base.set_epoch(epoch)


TOLD: dict[str, Callable[[], Any]] = {
    "itself": Told,
    "behind a Subset": lambda: Subset(Told(30), range(22)),
    "behind a ConcatDataset": lambda: ConcatDataset([Told(12), Told(10)]),
    "behind a ConcatDataset of Subsets": lambda: ConcatDataset([Subset(Told(), range(11)), Subset(Told(), range(11))]),
    "behind a StackDataset": lambda: StackDataset(Told(), Told()),
    "behind a wrapper that hands on": lambda: Wrapper(Told()),
    "behind two wrappers": lambda: Subset(Wrapper(Subset(Told(), range(22))), range(22)),
}


class AnyTask(raytrain.Task):
    """Batches of any samples."""

    def collate(self, samples: list[Any]) -> list[Any]:
        return samples


class Mixes(raytrain.Task):
    """Its collate draws by a generator of its own."""

    def __init__(self, cfg: Any) -> None:
        self.rng = np.random.default_rng()

    def collate(self, samples: list[Any]) -> Any:
        return float(self.rng.random())


class MixesUnseeded(Mixes):
    def collate(self, samples: list[Any]) -> Any:
        return float(np.random.default_rng().random())


class CountsBatches(Mixes):
    batches = 0

    def collate(self, samples: list[Any]) -> Any:
        samples.pop()
        self.batches += 1
        return self.batches


# What draws besides samples


class Noise(torch.nn.Module):
    """Dropout by a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) > 0.3)


class DrawsEverywhere(raytrain.Task):
    """Each of its methods draws, by a generator of its own and by a global one."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.rng = np.random.default_rng()

    def draw(self) -> float:
        return float(self.rng.random() + np.random.rand())

    def build_dataset(self, split: str) -> Any:
        return Numpys()

    def build_model(self, dataset: Any) -> torch.nn.Module:
        return torch.nn.Sequential(Noise(), torch.nn.Linear(2, 1, dtype=torch.float64))

    def collate(self, samples: list[Any]) -> Any:
        return np.stack([x for _, x in samples]) + self.draw()

    def to_device(self, batch: Any, device: torch.device) -> Any:
        return batch.to(device) + self.draw()

    def model_func(self, model: torch.nn.Module, batch: Any) -> raytrain.ModelReturn:
        drawn = self.draw()
        return raytrain.ModelReturn((model(batch) - drawn).square().mean(), {"drawn": drawn})

    def predict(self, model: torch.nn.Module, batch: Any) -> Any:
        return model(batch) + self.draw()

    def score(self, predictions: list[Any], dataset: Any) -> dict[str, float]:
        return {"mean": float(torch.stack(predictions).mean()), "drawn": self.draw() + float(dataset[3][1].sum())}


class DrawsLater(DrawsEverywhere):
    """A generator comes with the first step."""

    def model_func(self, model: torch.nn.Module, batch: Any) -> raytrain.ModelReturn:
        if not hasattr(self, "late"):
            self.late = random.Random(3)
        return raytrain.ModelReturn((model(batch) - self.late.random()).square().mean())


class DrawsUnseeded(DrawsEverywhere):
    def build_dataset(self, split: str) -> Any:
        return MadeOnTheSpot()


# What is drawn once and kept


class Kept(Samples):
    """A cache of whole samples, augmentation and all."""

    def __init__(self) -> None:
        self.cache: Any = {}

    def __getitem__(self, sample_id: int) -> Any:
        if sample_id not in self.cache:
            self.cache[sample_id] = self.made(sample_id)
        return self.cache[sample_id]

    def made(self, sample_id: int) -> Any:
        return sample_id, np.random.rand(2)


class KeptInAList(Kept):
    def __init__(self) -> None:
        self.cache = [None] * 22

    def __getitem__(self, sample_id: int) -> Any:
        self.cache[sample_id] = self.cache[sample_id] or self.made(sample_id)
        return self.cache[sample_id]


class KeptByTorch(Kept):
    def made(self, sample_id: int) -> Any:
        return sample_id, torch.rand(2)


class KeptOfOwn(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(3)

    def made(self, sample_id: int) -> Any:
        return sample_id, self.rng.random(2)


class KeptInPart(Kept):
    """The crop is kept, the noise is not."""

    def __getitem__(self, sample_id: int) -> Any:
        return super().__getitem__(sample_id), np.random.rand()


@functools.cache
def loaded(sample_id: int) -> float:
    return random.random()


class KeptByAFunction(Samples):
    def __getitem__(self, sample_id: int) -> Any:
        return sample_id, loaded(sample_id)


class Table(Samples):
    """What is drawn is made with the first sample, for all of them."""

    table: Any = None

    def __getitem__(self, sample_id: int) -> Any:
        if self.table is None:
            self.table = np.random.rand(22)
        return self.table[sample_id]


class LoadedOnce(Kept):
    """A cache of what was loaded; noise is added after that."""

    def __getitem__(self, sample_id: int) -> Any:
        return super().__getitem__(sample_id), np.random.rand()

    def made(self, sample_id: int) -> Any:
        return sample_id * 2.0


class MadeLate(Samples):
    """Its generator comes with the first sample."""

    rng: Any = None

    def draw(self) -> float:
        if self.rng is None:
            self.rng = np.random.default_rng(4)
        return float(self.rng.random() + np.random.rand())


KEPT = (Kept, KeptInAList, KeptByTorch, KeptOfOwn, KeptInPart, KeptByAFunction, Table)
NOT_KEPT = (LoadedOnce, MadeLate)


# Whole runs, stopped and resumed


class DrawnPoints(Dataset[Any]):
    """Points that generators of each kind shake; each is behind others, and so is what is told of the epoch."""

    def __init__(self, points: Points) -> None:
        self.points = Subset(points, range(22))
        self.drawn = Together(
            {
                "a Generator of numpy": Subset(Numpys(), range(22)),
                "a RandomState": ConcatDataset([Subset(Legacy(), range(11)), Subset(Legacy(), range(11))]),
                "a random.Random": Wrapper(Subset(Pythons(), range(22))),
                "a Generator of torch": ConcatDataset([Slotted()]),
                "in set_epoch": ConcatDataset([Subset(Told(), range(11)), Wrapper(Subset(Told(), range(11)))]),
            }
        )

    def __len__(self) -> int:
        return 22

    def __getitem__(self, sample_id: int) -> dict[str, Any]:
        sample = self.points[sample_id]
        # A weight for each entry, so that the order shows in which set_epoch has put them.
        draws = [values @ np.cos(np.arange(len(values))) for _, values in self.drawn[sample_id].values()]
        return sample | {"x": sample["x"] + 0.1 * torch.tensor([0.0, *draws], dtype=torch.float32)}


class DrawsBehind(Exact):
    """Its collate and the task's own methods draw too."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.rng = np.random.default_rng()

    def build_dataset(self, split: str) -> Any:
        points = super().build_dataset(split)
        return DrawnPoints(points) if split == "train" else points

    def collate(self, samples: list[Any]) -> Any:
        return super().collate(samples) | {"shift": float(self.rng.normal())}

    def model_func(self, model: Any, batch: Any) -> raytrain.ModelReturn:
        noise = batch["shift"] + self.rng.normal() if model.training else 0.0
        return super().model_func(model, batch | {"x": batch["x"] + 0.1 * noise})
