"""Small whole runs in this process, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tasks_for_units import TOY

import raytrain
from raytrain.config.sections import Config
from raytrain.engine.world import World
from raytrain.journal.records import read_journal
from raytrain.keeper.checkpointer import PendingSave
from raytrain.launch import Result
from raytrain.storage.state_file import load_weights_file
from raytrain.training.control import Control
from raytrain.training.preflight import LaunchOptions, find_start
from raytrain.training.worker import Outcome, run_job

INDEX = json.loads((TOY / "index.json").read_text())

CPU = torch.device("cpu")


def config(output: Path, task: str, optim: dict[str, Any], **sections: Any) -> Config:
    """Small and in-process; sections override those here."""
    tree = {
        "TASK": f"tasks_for_units:{task}",
        "OUTPUT": str(output),
        "OPTIMIZATION": {"BATCH_SIZE_PER_GPU": 4, "NUM_EPOCHS": 2, **optim},
        "SCALE": {"NUM_WORKERS": 0, "USE_GPU": False},
        "LOADER": {"WORKERS": 0},
        "LOG": {"EVERY": 1},
        **sections,
    }
    return Config.model_validate(tree)


def train(cfg: Config, **options: Any) -> Result:
    return raytrain.train(cfg, quiet=True, **options)


def journal(run_dir: str | Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_journal(Path(run_dir) / "journal.jsonl") if record["kind"] == kind]


def saved_state(checkpoint: str | None) -> dict[str, torch.Tensor]:
    assert checkpoint is not None
    return load_weights_file(f"{checkpoint}/checkpoint.pth")["model_state"]


def run_until(
    cfg: Config, stop_at: int | None = None, control: Watched | None = None, device: torch.device = CPU
) -> tuple[Outcome, Path]:
    job = find_start(cfg, LaunchOptions()).job(num_workers=0, use_gpu=device.type == "cuda")
    world = World(virtual_workers=job.virtual_workers, device=device)
    outcome = run_job(job, world, control or Watched(stop_at))
    return outcome, Path(job.run_uri)


def notes(run_dir: str | Path) -> list[str]:
    return [e["message"] for e in journal(run_dir, "event") if e["event"] == "note"]


class Watched(Control):
    """Wishes a stop after so many steps; its clock goes 10 s a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at, self.steps, self.told = stop_at, 0, []

    def write(self, record: dict[str, Any]) -> None:
        self.steps = max(self.steps, record.get("step", 0))

    def stop_wished(self) -> bool:
        return self.stop_at is not None and self.place().get("step", 0) >= self.stop_at

    def now(self) -> float:
        return 1_800_000_000.0 + 10 * self.place().get("step", 0)

    def saved(self, save: PendingSave | None, metrics: dict[str, float]) -> None:
        self.told.append((save, metrics))


class Kept:
    """A journal's sink that keeps the records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def flush(self) -> None: ...

    def close(self) -> None: ...
