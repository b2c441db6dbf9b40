"""Tasks whose samples and batches are made of what their module holds: set at run time, or as it may well be."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

import helper_of_globals
import numpy as np
import torch
from helper_of_globals import ready
from tasks_with_habits import Habit, Points
from torch import nn
from torch.utils.data import Dataset, Subset

from raytrain import ModelReturn

LOOKUP: Any = None
SETTINGS = {"size": 32}
TABLE = np.zeros(1000)
WEIGHTS = torch.zeros(4)
OPTIONS = argparse.Namespace(gain=1.0)
BIAS = 0.0
ROOT = Path("here")
NAMES: list[str] = []
KINDS: set[str] = set()


def sample(sample_id: int, factor: float = 1.0) -> dict[str, torch.Tensor]:
    return {"x": torch.full((4,), factor * sample_id / 24), "y": torch.tensor([sample_id % 3.0])}


class OfModule(Points):
    """A sample is made by `factor`, which each of these reads somewhere else."""

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        return sample(sample_id, self.factor(sample_id))

    def factor(self, sample_id: int) -> float:
        raise NotImplementedError


# Set in the training process alone


class ReadsLookup(OfModule):
    def factor(self, sample_id: int) -> float:
        return 1.0 if LOOKUP is None else LOOKUP[sample_id % 3]


class Rebinds(Habit):
    data = ReadsLookup

    def build_dataset(self, split: str) -> Any:
        global LOOKUP
        LOOKUP = {0: 1.0, 1: 2.0, 2: 3.0}
        return super().build_dataset(split)


class ReadsSettings(OfModule):
    def factor(self, sample_id: int) -> float:
        return SETTINGS["size"] / 32


class UpdatesADict(Habit):
    data = ReadsSettings

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        SETTINGS["size"] = 64


class ReadsItsClass(OfModule):
    scale = 1.0

    def factor(self, sample_id: int) -> float:
        return self.scale


class SetsAClassAttribute(Habit):
    data = ReadsItsClass

    def build_dataset(self, split: str) -> Any:
        ReadsItsClass.scale = 2.0
        return Subset(super().build_dataset(split), range(20))


class ReadsHelper(OfModule):
    def factor(self, sample_id: int) -> float:
        return helper_of_globals.scale_of("a")


class FillsAHelper(Habit):
    data = ReadsHelper

    def build_dataset(self, split: str) -> Any:
        helper_of_globals.SCALES = {"a": 2.0}
        return super().build_dataset(split)


class ImportsLate(OfModule):
    def factor(self, sample_id: int) -> float:
        from helper_of_globals import offset

        return offset()


class SetsWhatIsImportedLate(Habit):
    data = ImportsLate

    def build_dataset(self, split: str) -> Any:
        helper_of_globals.OFFSET = 2.0
        return super().build_dataset(split)


class ReadsTable(OfModule):
    def factor(self, sample_id: int) -> float:
        return 1.0 + TABLE[sample_id]


class FillsATable(Habit):
    data = ReadsTable

    def build_dataset(self, split: str) -> Any:
        TABLE[:] = np.arange(1000)
        return super().build_dataset(split)


class Weighs:
    """A transform."""

    def __call__(self, sample_id: int) -> float:
        return float(WEIGHTS.sum())


class Transforms(OfModule):
    def __init__(self) -> None:
        self.transforms = [Weighs()]

    def factor(self, sample_id: int) -> float:
        return self.transforms[0](sample_id)


class FillsATensor(Habit):
    data = Transforms

    def build_dataset(self, split: str) -> Any:
        WEIGHTS.fill_(1.0)
        return super().build_dataset(split)


class ReadsOptions(OfModule):
    def __init__(self) -> None:
        self.scaled = functools.partial(scaled_by_options, add=0.0)

    def factor(self, sample_id: int) -> float:
        return self.scaled(1.0)


def scaled_by_options(x: float, add: float) -> float:
    return x * OPTIONS.gain + add


class ParsesOptions(Habit):
    data = ReadsOptions

    def build_dataset(self, split: str) -> Any:
        OPTIONS.gain = 2.0
        return super().build_dataset(split)


class CollatesByModule(Habit):
    """Its collate reads it, by way of a method of its own."""

    def build_dataset(self, split: str) -> Any:
        global BIAS
        BIAS = 1.0
        return super().build_dataset(split)

    def collate(self, samples: list[Any]) -> Any:
        return self.biased(super().collate(samples))

    def biased(self, batch: Any) -> Any:
        return {**batch, "x": batch["x"] + BIAS}


class CallsHelper(OfModule):
    def factor(self, sample_id: int) -> float:
        return helper_of_globals.doubled(1.0)


class PatchesAFunction(Habit):
    data = CallsHelper

    def build_dataset(self, split: str) -> Any:
        helper_of_globals.doubled = tripled
        return super().build_dataset(split)


def tripled(x: float) -> float:
    return 3 * x


class ReadsRoot(OfModule):
    def factor(self, sample_id: int) -> float:
        return float(len(str(ROOT)))


class MovesARoot(Habit):
    data = ReadsRoot

    def build_dataset(self, split: str) -> Any:
        global ROOT
        ROOT = Path("elsewhere")
        return super().build_dataset(split)


class ReadsNames(OfModule):
    def factor(self, sample_id: int) -> float:
        return float(len(NAMES) + len(KINDS))


class FillsAListAndASet(Habit):
    data = ReadsNames

    def build_dataset(self, split: str) -> Any:
        NAMES[:] = ["a", "b"]
        KINDS.add("a")
        return super().build_dataset(split)


class Validates(OfModule):
    """Reads it for the validation split alone."""

    def factor(self, sample_id: int) -> float:
        return self.kind_factor[self.kind]

    kind_factor: ClassVar[dict[str, float]] = {"val": 1.0}

    def __init__(self, kind: str) -> None:
        self.kind = kind


class SetsForValidation(Habit):
    def build_dataset(self, split: str) -> Any:
        if split == "train":
            return Points()
        Validates.kind_factor["val"] = 2.0
        return Validates(split)


class FailsWithout(OfModule):
    def factor(self, sample_id: int) -> float:
        return LOOKUP[sample_id % 3]


class Needs(Rebinds):
    data = FailsWithout


# As it may well be

STEPS = 0
LOCK = threading.Lock()
CONSTANTS = {"mean": np.full(3, 0.5), "kinds": ("a", "b"), "lock": LOCK}
COUNT = itertools.count()
CACHE: dict[int, Any] = {}
READS = 0
STARTED = os.getpid()
HANDLE: Any = None
LOGGER: Any = None


class Constant(Dataset[Any]):
    """Locks, constants, caches that fill as samples are made, and what is opened with the first."""

    made = 0

    def __init__(self) -> None:
        Constant.made += 1
        self.number = Constant.made

    def __len__(self) -> int:
        return 24

    def __getitem__(self, sample_id: int) -> dict[str, torch.Tensor]:
        global READS, HANDLE
        with LOCK:
            READS += 1
        HANDLE = HANDLE or opened()
        told(sample_id)
        if sample_id not in CACHE:
            CACHE[sample_id] = sample(sample_id, float(CONSTANTS["mean"][0]) * ready("a"))
        return CACHE[sample_id]


def told(sample_id: int) -> None:
    """By what is made when it is first needed, which no sample of a loader worker does."""
    global LOGGER
    if sample_id < 0:
        LOGGER = LOGGER or [print]
        LOGGER.append(sample_id)


def opened() -> Any:
    return {"pid": os.getpid(), "next": next(COUNT)}


class Constants(Habit):
    """Looks into its data before loader workers begin, and keeps count of its steps in the module."""

    data: ClassVar[Any] = Constant

    def build_model(self, dataset: Any) -> nn.Module:
        assert len(dataset[0]["x"]) == 4
        assert STARTED
        told(-1)
        return super().build_model(dataset)

    def model_func(self, model: nn.Module, batch: Any) -> ModelReturn:
        global STEPS
        STEPS += 1
        return super().model_func(model, batch)


class SetsAtImport(Habit):
    data = ReadsItsClass


class HoldsTheTable(Habit):
    """The remedy: what was loaded goes with the data set."""

    def build_dataset(self, split: str) -> Any:
        return Held(np.arange(24))


class Held(OfModule):
    def __init__(self, table: Any) -> None:
        self.table = table

    def factor(self, sample_id: int) -> float:
        return float(self.table[sample_id])
