"""Small tasks that tests train; a run of one takes about a second.

They are imported by dotted path, `tasks_for_tests:Exact`, in the test's process, in the command
line's, in Ray workers and in loader workers.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from raytrain import ModelReturn, Task

FEATURES = 6


class Points(Dataset[Any]):
    """Made-up samples of two classes; in training each is shaken by all three global generators.

    A sample: x (FEATURES,) float32, y () int64, id, epoch.
    """

    def __init__(self, num_samples: int, augmented: bool) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(num_samples, FEATURES, generator=generator)
        self.y = (self.x.sum(1) > 0).long()
        self.augmented = augmented
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self.x[index]
        if self.augmented:
            x = x + 0.2 * torch.randn(FEATURES) + 0.2 * random.gauss(0.0, 1.0) + float(np.random.normal(0.0, 0.2))
        return {"x": x, "y": self.y[index], "id": index, "epoch": self.epoch}


class Net(nn.Module):
    """Two classes from FEATURES, with BatchNorm and dropout, and a ledger of the samples it was trained on.

    ledger:   (epochs, samples), one weight for each use that a sample should have
    forwards: training passes so far, of the first virtual worker
    """

    def __init__(self, num_epochs: int, num_samples: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            # A bias here would have no gradient but rounding errors, which Adam makes into whole steps.
            nn.Linear(FEATURES, 16, bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(16, 2),
        )
        self.ledger = nn.Parameter(torch.zeros(num_epochs, num_samples))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, FEATURES)   Returns (B, 2) logits."""
        return self.body(x)


class Exact(Task):
    """Where chance, order or state that is not restored would show in the weights.

    Under plain SGD of a constant rate (powers of two throughout) ledger[epoch, id] ends as
    -LR / LEDGER_SHARE / virtual workers, times the number of times that epoch trained on that sample, exactly.

    DATA_CONFIG.GATE: a folder; each training pass goes through `pass_gate` there and is written
    down in its `uses.txt`, and a file `spoil_score` in it makes the evaluation fail; while the file
    `building` exists there, its datasets wait.
    """

    LEDGER_SHARE = 8

    @property
    def gate(self) -> Path:
        return Path(self.cfg.DATA_CONFIG.get("GATE", "no-gate"))

    def build_dataset(self, split: str) -> Points:
        while (self.gate / "building").exists():
            (self.gate / "builds").touch()
            time.sleep(0.01)
        return Points(self.cfg.DATA_CONFIG.NUM_SAMPLES if split == "train" else 16, augmented=split == "train")

    def build_model(self, dataset: Points) -> Net:
        return Net(self.cfg.OPTIMIZATION.NUM_EPOCHS, self.cfg.DATA_CONFIG.NUM_SAMPLES)

    def model_func(self, model: Net, batch: dict[str, torch.Tensor]) -> ModelReturn:
        if model.training:
            step = int(model.forwards)
            write_down(self.gate, step, int(batch["epoch"][0]), batch["id"].tolist())
            pass_gate(self.gate, step)
            model.forwards += 1
        logits = model(batch["x"])
        loss = nn.functional.cross_entropy(logits, batch["y"])
        right = (logits.detach().argmax(1) == batch["y"]).float().mean()
        loss = loss + model.ledger[batch["epoch"], batch["id"]].sum() / self.LEDGER_SHARE
        return ModelReturn(loss, {"right": right}, {})

    def predict(self, model: Net, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).argmax(1)

    def score(self, predictions: list[torch.Tensor], dataset: Points) -> dict[str, float]:
        if (self.gate / "spoil_score").exists():
            raise RuntimeError("spoilt")
        return {"accuracy": float((torch.stack(predictions) == dataset.y).float().mean())}


class Poisoned(Exact):
    """While the gate has the file `poison`, "EPOCH ID ID ...", the loss on these samples is NaN in that epoch."""

    def model_func(self, model: Net, batch: dict[str, torch.Tensor]) -> ModelReturn:
        returned = super().model_func(model, batch)
        file = self.gate / "poison"
        if model.training and file.exists():
            epoch, *ids = map(int, file.read_text().split())
            if int(batch["epoch"][0]) == epoch and set(ids) & set(batch["id"].tolist()):
                returned.loss = returned.loss * float("nan")
        return returned


class Unscored(Exact):
    """Has nothing to evaluate on."""

    def build_dataset(self, split: str) -> Any:
        return super().build_dataset(split) if split == "train" else None


class HeldClones(Exact):
    """Only the trials of a sweep that are clones go through the gate."""

    @property
    def gate(self) -> Path:
        return super().gate if self.cfg.OPTIMIZATION.PHASES else Path("no-gate")


class Longer(Exact):
    """Its model is the same for any number of epochs up to 8, so that a run of it can be made longer."""

    def build_model(self, dataset: Points) -> Net:
        return Net(8, self.cfg.DATA_CONFIG.NUM_SAMPLES)


class SplitByChance(Exact):
    """Draws its split from the global generator, as many tasks do."""

    def build_dataset(self, split: str) -> Any:
        whole = Points(self.cfg.DATA_CONFIG.NUM_SAMPLES, augmented=False)
        train, val = torch.utils.data.random_split(whole, [0.5, 0.5])
        return train if split == "train" else val

    def score(self, predictions: list[torch.Tensor], dataset: Any) -> dict[str, float]:
        return {"accuracy": sum(p.item() == int(dataset[i]["y"]) for i, p in enumerate(predictions)) / len(dataset)}


class CountingNet(Net):
    """Keeps state that is no tensor, as modules with get_extra_state do; its output depends on it."""

    def __init__(self, num_epochs: int, num_samples: int) -> None:
        super().__init__(num_epochs, num_samples)
        self.calls = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return super().forward(x) * (1.0 + 0.01 * self.calls)


class Counting(Exact):
    """A model with extra state."""

    def build_model(self, dataset: Points) -> CountingNet:
        return CountingNet(self.cfg.OPTIMIZATION.NUM_EPOCHS, self.cfg.DATA_CONFIG.NUM_SAMPLES)


def write_down(gate: Path, step: int, epoch: int, ids: list[int]) -> None:
    """Appends `step epoch id,id,...` to uses.txt, in one piece."""
    if gate.exists():
        with open(gate / "uses.txt", "ab", buffering=0) as file:
            file.write(f"{step} {epoch} {','.join(map(str, ids))}\n".encode())


def pass_gate(gate: Path, step: int) -> None:
    """Holds a training pass where the test wants it held: a process can then be killed at a chosen step.

    step: steps done before this one.   While the file `hold` exists, passes of the step that it
    names and of later ones wait, having left the file `held-<pid>`. The file `fail` names a step
    that fails, `exit` one that ends the interpreter; `SIGTERM` or `SIGINT` one in which the process
    sends itself that. While the file `slow` exists, each pass takes the seconds that it says.
    """
    for name in ("SIGTERM", "SIGINT"):
        if read_number(gate / name) == step:
            os.kill(os.getpid(), signal.Signals[name])
    if read_number(gate / "exit") == step:
        sys.exit("the task has seen enough")
    if read_number(gate / "fail") == step:
        raise RuntimeError(f"failed at step {step}, as the test wished")
    slow = read_number(gate / "slow")
    if slow is not None:
        time.sleep(slow)
    held = gate / f"held-{os.getpid()}"
    while (hold := read_number(gate / "hold")) is not None and step >= hold:
        held.touch()
        time.sleep(0.01)
    held.unlink(missing_ok=True)


def read_number(path: Path) -> float | None:
    """The number in a file; None if there is no such file."""
    try:
        return float(path.read_text())
    except FileNotFoundError:
        return None
