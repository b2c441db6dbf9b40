"""A task whose workers hang or are slow where the test wants it.

In DATA_CONFIG.GATE, beside what tasks_for_tests.Exact finds there: `forward` names a step, `data` a sample and
`eval` anything at which the first rank other than 0 (a loader worker: the first) that comes there hangs, once;
while there is `slow_forward`, that takes rank 1 so many seconds longer.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tasks_for_tests import Exact, Net, Points, read_number

from raytrain import ModelReturn


class DeadlockedPoints(Points):
    gate: Path

    def __getitem__(self, index: int) -> dict[str, Any]:
        if comes(self.gate / "data", index):
            wait_for_a_lock_of_its_own()
        return super().__getitem__(index)


class Hanging(Exact):
    def build_dataset(self, split: str) -> Points:
        dataset = super().build_dataset(split)
        if split == "train":
            dataset.__class__ = DeadlockedPoints
            dataset.gate = self.gate.absolute()
        return dataset

    def model_func(self, model: Net, batch: dict[str, torch.Tensor]) -> ModelReturn:
        if model.training and dist.get_rank() > 0:
            if comes(self.gate / "forward", int(model.forwards)):
                sleep_for_ever()
            time.sleep(read_number(self.gate / "slow_forward") or 0.0)
        return super().model_func(model, batch)

    def predict(self, model: Net, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if dist.get_rank() > 0 and comes(self.gate / "eval", 0):
            hold_the_interpreter()
        return super().predict(model, batch)


def comes(sign: Path, number: int) -> bool:
    """True once: when the number is in that file, which is then gone."""
    if read_number(sign) != number:
        return False
    with contextlib.suppress(FileNotFoundError):
        sign.unlink()
        return True
    return False


def sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


def wait_for_a_lock_of_its_own() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


def hold_the_interpreter() -> None:
    ctypes.PyDLL(None).sleep(3600)  # which does not let go of the interpreter lock, as broken extensions do
