"""Tasks that break the Task contract, one thing each; what a user is told of it is in bad_inputs.yaml."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from raytrain import ModelReturn, Task


class Points(Dataset[Any]):
    """`size` samples {"x": (3,) float32, "y": () float32}."""

    def __init__(self, size: int = 12) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return {"x": torch.arange(3) * 0.1 + index, "y": torch.tensor(float(index))}


class Good(Task):
    """Nothing is wrong with this one."""

    def build_dataset(self, split: str) -> Any:
        return Points(self.cfg.DATA_CONFIG.get("SIZE", 12) if split == "train" else 6)

    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Linear(3, self.cfg.MODEL.get("WIDTH", 1))

    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(((model(batch["x"])[:, 0] - batch["y"]) ** 2).mean())

    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return model(batch["x"])[:, 0]

    def score(self, predictions: list[Any], dataset: Any) -> Any:
        return {"error": sum(abs(float(p) - i) for i, p in enumerate(predictions)) / len(predictions)}


class NotATask:
    pass


class InitRaises(Good):
    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.width = cfg.MODEL.WIDTH


class InitTakesNothing(Good):
    def __init__(self) -> None:
        pass


class NothingWritten(Task):
    pass


class ModelIsADict(Good):
    def build_model(self, dataset: Any) -> Any:
        return {"weight": torch.zeros(3)}


class ModelClassItself(Good):
    def build_model(self, dataset: Any) -> Any:
        return nn.Identity


class ModelRaises(Good):
    def build_model(self, dataset: Any) -> Any:
        return nn.Linear(3, -1)


class NoParameters(Good):
    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Flatten()


class AllFrozen(Good):
    def build_model(self, dataset: Any) -> nn.Module:
        return nn.Linear(3, 1).requires_grad_(False)


class LazyModel(Good):
    def build_model(self, dataset: Any) -> nn.Module:
        return nn.LazyLinear(1)


class LossIsNone(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        super().model_func(model, batch)


class LossIsAFloat(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(super().model_func(model, batch).loss.item())  # type: ignore[arg-type]


class LossAlone(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return super().model_func(model, batch).loss


class LossIsDetached(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(super().model_func(model, batch).loss.detach())


class LossIsWhole(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn((model(batch["x"]) > 0).sum())


class LossIsNan(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(super().model_func(model, batch).loss * float("nan"))


class ModelFuncRaises(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(model(batch["x"].T).mean())


class TermIsAList(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(super().model_func(model, batch).loss, tb_dict={"parts": [1.0, 2.0]})


class TermsAreAList(Good):
    def model_func(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return ModelReturn(super().model_func(model, batch).loss, tb_dict=[1.0])  # type: ignore[arg-type]


class EmptySet(Good):
    def build_dataset(self, split: str) -> Any:
        return Points(0)


class EmptyValidationSet(Good):
    def build_dataset(self, split: str) -> Any:
        return Points(12 if split == "train" else 0)


class NoSet(Good):
    def build_dataset(self, split: str) -> Any:
        return None


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Points())


class IterableSet(Good):
    def build_dataset(self, split: str) -> Any:
        return Stream()


class SetWithoutLength(Good):
    def build_dataset(self, split: str) -> Any:
        class Endless:
            def __getitem__(self, index: int) -> Any:
                return Points()[0]

        return Endless()


class SetMissing(Good):
    def build_dataset(self, split: str) -> Any:
        with open("points/train.bin", "rb") as file:
            return file.read()


class Sevenless(Points):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == 7:
            raise ValueError("the scan is cut short")
        return super().__getitem__(index)


class SampleRaises(Good):
    def build_dataset(self, split: str) -> Any:
        return Sevenless()


class Exits(Points):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        os._exit(9)


class LoaderWorkerDies(Good):
    def build_dataset(self, split: str) -> Any:
        return Exits()


class Ragged(Points):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(3 + index % 2), "y": torch.tensor(0.0)}


class RaggedSamples(Good):
    def build_dataset(self, split: str) -> Any:
        return Ragged()


class Odd:
    """What default_collate knows nothing of."""


class OddSet(Points):
    def __getitem__(self, index: int) -> Any:
        return Odd()


class OddSamples(Good):
    def build_dataset(self, split: str) -> Any:
        return OddSet()


class HoldsALambda(Points):
    def __init__(self) -> None:
        super().__init__()
        self.move = lambda x: x


class UnpicklableSet(Good):
    def build_dataset(self, split: str) -> Any:
        return HoldsALambda()


class UnpicklableBatch(Good):
    def collate(self, samples: list[Any]) -> Any:
        return {**super().collate(samples), "undo": lambda: samples}


class PredictsOneForAll(Good):
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return model(batch["x"]).mean()


class PredictsTooFew(Good):
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return model(batch["x"])[1:]


class PredictsNothing(Good):
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return None


class PredictRaises(Good):
    def predict(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        return batch["image"]


class NoScore(Good):
    score = Task.score


class ScoreIsANumber(Good):
    def score(self, predictions: list[Any], dataset: Any) -> Any:
        return 0.5


class ScoreIsWords(Good):
    def score(self, predictions: list[Any], dataset: Any) -> Any:
        return {"error": 0.5, "verdict": "good"}


class ScoreRaises(Good):
    def score(self, predictions: list[Any], dataset: Any) -> Any:
        return {"error": 1 / 0}


class ScoreIsNan(Good):
    def score(self, predictions: list[Any], dataset: Any) -> Any:
        return {"error": float("nan")}


class Stopping(Points):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        marker = Path("stopped")
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class StoppedOnce(Good):
    """The process that trains it is sent SIGTERM in the first step of the first launch."""

    def build_dataset(self, split: str) -> Any:
        return Stopping()
