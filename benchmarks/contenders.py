"""Who is compared: for each loop the command that runs an assignment, and where it leaves what it found."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.measure import BenchmarkError, run_command, scratch
from benchmarks.pieces import GRAD_NORM_CLIP, LR, OVERHEAD, SEED, WATCH, WEIGHT_DECAY, WEIGHTS, Assignment, Span

CONFIG = "benchmark.yaml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """What one run of one loop left. began, ended: time.time() around the command."""

    began: float
    ended: float
    watch: dict[str, Any]
    loss: float
    weights: dict[str, torch.Tensor]

    @property
    def steps_per_s(self) -> float:
        return float(self.watch["steps"] / self.watch["seconds"])

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Contender:
    """A loop: `command` gives the words that run an assignment, `result` its last loss and weights."""

    key: str
    name: str
    ranks: int
    command: Callable[[Assignment], list[str]]
    result: Callable[[Path], tuple[float, dict[str, torch.Tensor]]]
    missing: Callable[[Contender], str | None] = lambda contender: None

    def run(self, assignment: Assignment, timeout_s: float) -> Ended:
        """BenchmarkError if it fails, or did something else than it was told."""
        began, ended = run_command(self.command(assignment), assignment.folder, timeout_s)
        watch = json.loads((assignment.folder / WATCH).read_text())
        if watch["ranks"] != self.ranks:
            raise BenchmarkError(f"{self.name} trained on {watch['ranks']} ranks, not on {self.ranks}")
        return Ended(began, ended, watch, *self.result(assignment.folder))


def script(module: str, *words: str) -> Callable[[Assignment], list[str]]:
    """In one process: a module of this folder."""
    return lambda assignment: [sys.executable, "-m", f"benchmarks.{module}", *words, *assignment.words()]


def under_torchrun(module: str, *words: str) -> Callable[[Assignment], list[str]]:
    return lambda assignment: [*TORCHRUN, "-m", f"benchmarks.{module}", *words, *assignment.words()]


def raytrain(ranks: int, *flags: str) -> Callable[[Assignment], list[str]]:
    """`raytrain train`, as a user types it."""
    return lambda assignment: [sys.executable, "-m", "raytrain", *train_words(assignment, ranks), *flags]


def raytrain_under_torchrun(assignment: Assignment) -> list[str]:
    return [*TORCHRUN, "-m", "raytrain", *train_words(assignment, ranks=2)]


def train_words(assignment: Assignment, ranks: int) -> list[str]:
    path = assignment.folder / CONFIG
    path.write_text(yaml.safe_dump(config_of(assignment, ranks)))
    return ["train", "--cfg_file", str(path)]


def config_of(assignment: Assignment, ranks: int) -> dict[str, Any]:
    """raytrain's config of an assignment. LOG is as every user has it; no checkpoint falls into the timed part."""
    span, workload = assignment.span, assignment.workload
    return {
        "TASK": f"benchmarks.workloads:{workload.name.title()}",
        "SEED": SEED,
        "OUTPUT": str(assignment.folder / "output"),
        "MODEL": {
            "NUM_SAMPLES": assignment.num_samples(ranks),
            "WARMUP": span.warmup,
            "LAST": span.last,
            "FOLDER": str(assignment.folder),
        },
        "OPTIMIZATION": {
            "OPTIMIZER": "adamw",
            "SCHEDULER": "constant",
            "LR": LR,
            "WEIGHT_DECAY": WEIGHT_DECAY,
            "BATCH_SIZE_PER_GPU": workload.batch_size,
            "NUM_EPOCHS": span.epochs,
            "GRAD_NORM_CLIP": GRAD_NORM_CLIP,
            "USE_AMP": assignment.precision == "bf16",
            "AMP_DTYPE": "bf16",
        },
        "SCALE": {"USE_GPU": assignment.device == "cuda", "THREADS": 1},
        "LOADER": {"WORKERS": 0},
        "CHECKPOINT": {"EVERY_EPOCHS": None, "EVERY_SECONDS": None},
    }


def kept(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """What Assignment.keep has written."""
    found = torch.load(folder / WEIGHTS, weights_only=True)
    return found["loss"], found["weights"]


def in_run_folder(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """What raytrain's journal and its last checkpoint say."""
    (journal,) = (folder / "output").rglob("journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    last_step = [record for record in records if record["kind"] == "step"][-1]
    last_checkpoint = [record for record in records if record["kind"] == "checkpoint"][-1]
    path = journal.parent / "ckpt" / last_checkpoint["name"] / "checkpoint.pth"
    return last_step["loss"], torch.load(path, weights_only=True, map_location="cpu")["model_state"]


def needs(*modules: str) -> Callable[[Contender], str | None]:
    """Says which of these modules cannot be imported."""

    def missing(contender: Contender) -> str | None:
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        return f"not installed ({', '.join(absent)})" if absent else None

    return missing


@functools.cache
def cannot_run(contender: Contender) -> str | None:
    """Why a run of a few steps fails; None if it does not."""
    with scratch() as folder:
        try:
            contender.run(Assignment(OVERHEAD, Span(0, 4, 1), folder), timeout_s=90.0)
        except BenchmarkError as error:
            first, *printed = str(error).splitlines()
            errors = [line.strip() for line in printed if "Error: " in line]
            return " ".join(["it", first.rpartition("` ")[2].partition(";")[0], *errors[:1]])
    return None


HAND_DDP = Contender("ddp", "hand-written DDP under torchrun", 2, under_torchrun("handwritten"), kept)
HAND_PLAIN = Contender("plain", "hand-written, one process", 1, script("handwritten"), kept)
RAYTRAIN = Contender("raytrain", "raytrain under Ray", 2, raytrain(2, "--num_workers", "2"), in_run_folder)
RAYTRAIN_TORCHRUN = Contender(
    "raytrain-torchrun", "raytrain under torchrun", 2, raytrain_under_torchrun, in_run_folder, cannot_run
)
RAYTRAIN_HERE = Contender(
    "raytrain-here", "raytrain, --num_workers 0", 1, raytrain(1, "--num_workers", "0"), in_run_folder
)
RAY_IDIOM = Contender("ray-train", "Ray Train, the documented idiom", 2, script("ray_idiom"), kept)
LIGHTNING = Contender("lightning", "Lightning", 2, under_torchrun("frameworks", "lightning"), kept, needs("lightning"))
ACCELERATE = Contender(
    "accelerate", "Accelerate", 2, under_torchrun("frameworks", "accelerate"), kept, needs("accelerate")
)
LIGHTNING_HERE = Contender(
    "lightning-here", "Lightning", 1, script("frameworks", "lightning"), kept, needs("lightning")
)
ACCELERATE_HERE = Contender(
    "accelerate-here", "Accelerate", 1, script("frameworks", "accelerate"), kept, needs("accelerate")
)
OPENPCDET = Contender(  # train_utils lies in its folder tools/, which must be in PYTHONPATH
    "openpcdet",
    "OpenPCDet's own loop",
    2,
    under_torchrun("frameworks", "openpcdet"),
    kept,
    needs("pcdet", "train_utils"),
)
CONTENDERS = (
    HAND_DDP,
    RAYTRAIN,
    RAYTRAIN_TORCHRUN,
    RAY_IDIOM,
    LIGHTNING,
    ACCELERATE,
    OPENPCDET,
    HAND_PLAIN,
    RAYTRAIN_HERE,
)
