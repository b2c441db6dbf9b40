"""Saving under Ray Train as its documentation has it: ray.train.report with a checkpoint in a temporary folder.

`python -m benchmarks.ray_savers RANKS SYNC|ASYNC WORKLOAD WARMUP TIMED EPOCHS AFTER FOLDER`
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointConfig, CheckpointUploadMode, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks import savers
from benchmarks.pieces import Assignment


class Report:
    """Each rank reports, rank 0 with a checkpoint; Ray copies it to the storage."""

    def __init__(self, mode: CheckpointUploadMode) -> None:
        self.mode = mode

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            folder = tempfile.mkdtemp()
            state = savers.state_of(model, optimizer, step)
            torch.save(state, os.path.join(folder, "model.pt"))  # noqa: PTH118 (as documented)
            checkpoint = Checkpoint.from_directory(folder)
        delete = True  # the documentation's TemporaryDirectory does this in SYNC mode, Ray by default in ASYNC mode
        ray.train.report({"step": step}, checkpoint, None, self.mode, delete)

    def finish(self) -> None:
        ray.train.get_all_reported_checkpoints()  # up to 2 s after the last one is there: Ray asks so seldom


def train_func(config: dict[str, Any]) -> None:
    """What every worker runs."""
    assignment = Assignment.of_words(config["words"])
    torch.set_num_threads(1)
    model: Any = ray.train.torch.prepare_model(assignment.workload.model())
    context = ray.train.get_context()
    loader = savers.loader_of(assignment, context.get_world_rank(), context.get_world_size())
    loader = ray.train.torch.prepare_data_loader(loader)
    savers.train(assignment, model, loader, Report(CheckpointUploadMode[config["mode"]]))


def main() -> None:
    ranks, mode, *words = sys.argv[1:]
    assignment = Assignment.of_words(words)
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"mode": mode, "words": words},
        scaling_config=ScalingConfig(num_workers=int(ranks), use_gpu=False),
        run_config=RunConfig(
            name="saves",
            storage_path=str(assignment.folder / "ray_results"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
