"""A task that something happens to at a chosen step, in a chosen phase of it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
from tasks_for_tests import Exact, Net, Points

from raytrain import ModelReturn
from raytrain.engine.collectives import CollectiveReduction
from raytrain.engine.shared_memory import SharedMemoryReduction
from raytrain.storage.file_layout import FileBuffer

MANY = 1 << 20  # weights: a state of 12 MB takes some ms to copy, and some more to write
INSIDE = {  # functions that a process is in while it is in that phase
    "saving": (FileBuffer.fill,),
    "reduce": (SharedMemoryReduction.reduce, CollectiveReduction.reduce),
}


class HeavyNet(Net):
    """A Net with many weights more, of which each sample moves one."""

    def __init__(self, num_epochs: int, num_samples: int) -> None:
        super().__init__(num_epochs, num_samples)
        self.many = torch.nn.Parameter(torch.zeros(MANY))


class Faulty(Exact):
    """An Exact in which, once, what the file `fault` in its gate says happens: see `suffer`."""

    step = 0

    def build_dataset(self, split: str) -> Points:
        data = super().build_dataset(split)
        if split == "train":
            data.__class__ = FaultyPoints
            data.task = self
        return data

    def build_model(self, dataset: Points) -> HeavyNet:
        return HeavyNet(self.cfg.OPTIMIZATION.NUM_EPOCHS, self.cfg.DATA_CONFIG.NUM_SAMPLES)

    def model_func(self, model: HeavyNet, batch: dict[str, torch.Tensor]) -> ModelReturn:
        if model.training:
            self.step = int(model.forwards)
            for phase in INSIDE:
                if is_due(self.gate, phase, self.step):
                    suffer_inside(self.gate, phase, self.step)
            suffer(self.gate, "forward", self.step)
        returned = super().model_func(model, batch)
        loss = returned.loss + model.many[batch["id"] * 1000].square().sum() + model.many[batch["id"]].sum()
        if model.training:
            loss.register_hook(lambda _: suffer(self.gate, "backward", self.step))
        return ModelReturn(loss, returned.tb_dict, returned.disp_dict)

    def predict(self, model: HeavyNet, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        suffer(self.gate, "eval", self.step)
        return super().predict(model, batch)


class FaultyPoints(Points):
    task: Faulty

    def __getitem__(self, index: int) -> dict[str, Any]:
        suffer(self.task.gate, "data", self.task.step)
        return super().__getitem__(index)


def is_due(gate: Path, phase: str, step: int) -> bool:
    """Whether the file `fault` ("PHASE STEP RANK WORD") means this phase, this step or an earlier one, this process."""
    try:
        wanted, at, rank, _ = (gate / "fault").read_text().split()
    except (FileNotFoundError, ValueError):  # none, or it is just being written
        return False
    return wanted == phase and step >= int(at) and int(rank) == (dist.get_rank() if dist.is_initialized() else 0)


def suffer(gate: Path, phase: str, step: int) -> None:
    """If it is due, this process raises an error (WORD `raise`), or sends itself the signal that WORD names."""
    if is_due(gate, phase, step):
        try:
            word = (gate / "fault").read_text().split()[3]
            (gate / "fault").unlink()
        except FileNotFoundError:  # another process was first
            return
        if word == "raise":
            raise RuntimeError(f"failed in {phase}, as the test wished")
        os.kill(os.getpid(), signal.Signals[word])


def suffer_inside(gate: Path, phase: str, step: int) -> None:
    """Suffers as soon as this thread is in that phase, which it is asked at each call that it makes."""

    codes = [function.__code__ for function in INSIDE[phase]]

    def called(frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call" and is_in(frame, codes):
            sys.setprofile(None)
            suffer(gate, phase, step)

    sys.setprofile(called)


def is_in(frame: FrameType | None, codes: Sequence[CodeType]) -> bool:
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False


class Named(Exact):
    """An Exact whose processes leave their pids in the gate, as `rank-<rank>`, once they train."""

    named = False

    def model_func(self, model: Net, batch: dict[str, torch.Tensor]) -> ModelReturn:
        if not self.named:
            self.named = True
            rank = dist.get_rank() if dist.is_initialized() else 0
            (self.gate / f"rank-{rank}").write_text(str(os.getpid()))
        return super().model_func(model, batch)
