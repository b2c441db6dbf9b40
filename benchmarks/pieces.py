"""The work that every loop does, in plain torch: models, samples, hyperparameters, and the watch that times them all.

Nothing of raytrain is imported here, so that no other loop pays for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

SEED = 0  # of the samples' order; the documented Ray idiom knows no other
LR = 1e-4
WEIGHT_DECAY = 0.01
GRAD_NORM_CLIP = 10.0
NUM_CLASSES = 10
POOL = 1024  # different samples in a data set of any length
WEIGHTS = "weights.pt"
WATCH = "watch.json"
COUNT_WAITS = "BENCHMARK_COUNT_WAITS"
SHOWN_WAITS = 5


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained. batch_size is each rank's; sample_shape is without the batch."""

    name: str
    batch_size: int
    sample_shape: tuple[int, ...]
    layers: Callable[[], nn.Module]

    def model(self) -> nn.Module:
        """The model on the CPU, with the same initial weights each time."""
        model = self.layers()
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model


def mlp() -> nn.Module:
    """Ten linear layers, 20 tensors, 38,000 numbers: next to nothing to compute, so a step is what the loop costs.

    Tanh, which has no kink: with ReLU a change of 1e-7 in the initial weights ends 1e-2 apart after 1,600 steps of
    AdamW in f32, whoever writes the loop (in f64 all agree to 2e-15), and the check of the weights would show nothing.
    """
    layers: list[nn.Module] = []
    for _ in range(9):
        layers += [nn.Linear(64, 64), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, NUM_CLASSES))


def conv_net() -> nn.Module:
    """Six convolutions with BatchNorm, 290,000 numbers: about 70 ms forward and backward on one core.

    SiLU, which has no kink: rounding alone, carried on by 70 steps of AdamW, moves the weights by 2e-5 of their
    largest; with ReLU, which it switches here and there, by 4e-2, and the check of the weights would show nothing.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, NUM_CLASSES))


def wide_mlp(width: int) -> nn.Module:
    """Twelve linear layers of width to width: what is trained hardly matters, how large its state is does."""
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, NUM_CLASSES))


OVERHEAD = Workload("overhead", 8, (64,), mlp)
CONV = Workload("conv", 20, (3, 32, 32), conv_net)
HEAVY = Workload("heavy", 160, (2048,), functools.partial(wide_mlp, 2048))  # 50.4 M numbers, with AdamW's 605 MB
LIGHT = Workload("light", 160, (640,), functools.partial(wide_mlp, 640))  # 4.9 M, 59 MB
WORKLOADS = {workload.name: workload for workload in (OVERHEAD, CONV, HEAVY, LIGHT)}
LIDAR = Workload("lidar", 4, (), nn.Module)  # model and samples are a task's (benchmarks/lidar.py)


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples in memory, the same each time; the class is the largest of the first ten numbers."""

    def __init__(self, shape: tuple[int, ...], num_samples: int) -> None:
        self.inputs = torch.randn(POOL, *shape, generator=torch.Generator().manual_seed(2))
        self.targets = self.inputs.flatten(1)[:, :NUM_CLASSES].argmax(1)
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index % POOL], self.targets[index % POOL]


class CostlySamples(Samples):
    """The same after about a millisecond of numpy, as reading and augmenting a small sample takes."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, target = super().__getitem__(index)
        noise = np.sort(np.sin(np.arange(index, index + 15_000, dtype=np.float64)))
        return inputs + float(noise[0]), target


@dataclasses.dataclass(frozen=True)
class Span:
    """Which steps a loop runs: warm-up, the timed ones, then at least `after` more, the first to mark their end."""

    warmup: int
    timed: int
    epochs: int = 2
    after: int = 1

    @property
    def last(self) -> int:
        """The step, counted from 0, whose start ends the timed part."""
        return self.warmup + self.timed

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil((self.last + self.after) / self.epochs)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What one run of one loop is told: on the command line where it is a process of its own.

    device:    cpu or cuda;  precision: fp32 or bf16
    """

    workload: Workload
    span: Span
    folder: Path
    device: str = "cpu"
    precision: str = "fp32"

    def words(self) -> list[str]:
        counts = dataclasses.astuple(self.span)
        how = ["--device", self.device, "--precision", self.precision]
        return [self.workload.name, *map(str, counts), str(self.folder), *how]

    @classmethod
    def of_words(cls, words: Sequence[str] | None = None) -> Assignment:
        parser = argparse.ArgumentParser(description="One run of one loop; `python -m benchmarks.loop` runs them all.")
        workloads = {**WORKLOADS, LIDAR.name: LIDAR}
        parser.add_argument("workload", choices=workloads)
        counts = [field.name for field in dataclasses.fields(Span)]
        for count in counts:
            parser.add_argument(count, type=int)
        parser.add_argument("folder", type=Path)
        parser.add_argument("--device", default="cpu")
        parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
        given = parser.parse_args(words)
        span = Span(*(getattr(given, count) for count in counts))
        return cls(workloads[given.workload], span, given.folder, given.device, given.precision)

    def autocast(self) -> torch.autocast:
        """For the passes through the model."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")

    def num_samples(self, ranks: int) -> int:
        """Full batches only: every loop then takes the same number of samples in each step."""
        return self.span.steps_per_epoch * self.workload.batch_size * ranks

    def dataset(self, ranks: int) -> Samples:
        return Samples(self.workload.sample_shape, self.num_samples(ranks))

    def watch(self) -> Stopwatch:
        return Stopwatch(self.folder / WATCH, self.span.warmup, self.span.last)

    def keep(self, weights: dict[str, torch.Tensor], loss: float) -> None:
        """Write what the run ended with: state_dict, and the last step's loss over all ranks."""
        on_host = {name: tensor.cpu() for name, tensor in weights.items()}
        torch.save({"weights": on_host, "loss": loss}, self.folder / WEIGHTS)


class Stopwatch:
    """Notes when this process begins which step; rank 0 writes it to `path` when it begins step `last`.

    Every loop calls tick() once a step, right before its forward pass. On a GPU the timed part begins and ends with a
    wait for it. With COUNT_WAITS in the environment it is counted how often the host waits for the GPU in between.
    """

    def __init__(self, path: Path, warmup: int, last: int) -> None:
        self.path, self.warmup, self.last = path, warmup, last
        self.stamps: dict[str, float] = {}  # what -> time.time()
        self._count = 0
        self._timed_from = 0.0
        self._waits: Counter[str] = Counter()

    def stamp(self, what: str) -> None:
        self.stamps[what] = time.time()

    def tick(self) -> None:
        if self._count == 0:
            self.stamp("first step")
            self.stamps |= process_starts()
        if self._count == self.warmup:
            self._wait()
            self._timed_from = time.perf_counter()
            if COUNT_WAITS in os.environ:
                self._waits = count_waits()
        if self._count == self.last:
            if COUNT_WAITS in os.environ:
                set_sync_debug_mode("default")
            self._wait()
            seconds = time.perf_counter() - self._timed_from
            self.stamp("last step")
            self._write(seconds)
        self._count += 1

    def _wait(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def _write(self, seconds: float) -> None:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if ranks > 1 and torch.distributed.get_rank() > 0:
            return
        noted: dict[str, Any] = {
            "seconds": seconds,
            "steps": self.last - self.warmup,
            "ranks": ranks,
            "stamps": self.stamps,
            "waits": dict(self._waits.most_common(SHOWN_WAITS)),
            "waits_per_step": self._waits.total() / (self.last - self.warmup),
            "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0,
        }
        self.path.write_text(json.dumps(noted))


def count_waits() -> Counter[str]:
    """From now on, how often the host waits for the GPU, by the line that does; counted by torch's own warnings."""
    found: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if "synchroniz" in str(message):
            found[f"{Path(filename).name}:{lineno}"] += 1

    warnings.simplefilter("always")
    warnings.showwarning = note
    set_sync_debug_mode("warn")
    return found


def set_sync_debug_mode(mode: str) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def process_starts() -> dict[str, float]:
    """When this process, its parent (torchrun, the raylet) and Ray Train's controller were started: time.time().

    Read from /proc, to 10 ms, so that no product has to be touched for it; empty where there is none.
    """
    try:
        parent = os.getppid()
        found = {"process": started_at(os.getpid()), "parent": started_at(parent)}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and is_controller(folder) and fields_of(folder)[1] == str(parent):
                found["controller"] = started_at(int(folder.name))
    except OSError:
        return {}
    return found


def is_controller(folder: Path) -> bool:
    try:
        return b"TrainController" in (folder / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def fields_of(folder: Path) -> list[str]:
    """What /proc/PID/stat says after the name: state, parent, ..."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def started_at(pid: int) -> float:
    """When a process was started, as time.time()."""
    ticks = int(fields_of(Path(f"/proc/{pid}"))[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
