"""The loop that recovery.py kills, thrice: as raytrain's task, by hand under torchrun, and as Ray Train documents it.

All train the same model, 50 ms a step, save every 10 steps, and write down which step they begin when. The number of
the step is a buffer of the model, so it goes with the checkpoint wherever that comes from.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.pieces import LR, OVERHEAD, WEIGHT_DECAY, Samples
from raytrain import ModelReturn, Task

STEP_S = 0.05
SAVE_EVERY = 10
KILLED_IN = 396  # the step, counted from 0, in which a worker is killed: 20 s after the first one
STEPS = 420
STEPS_FILE = "steps.txt"


class Counted(torch.nn.Module):
    """The overhead workload's net, which knows how many steps it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = OVERHEAD.model()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)  # type: ignore[no-any-return]


def begin_step(model: Any, folder: Path) -> None:
    """Writes down that this process begins the model's next step, which takes a while."""
    with open(folder / STEPS_FILE, "ab", buffering=0) as file:
        file.write(f"{time.time():.3f} {int(model.steps)} {os.getpid()}\n".encode())
    model.steps += 1
    time.sleep(STEP_S)


def dataset(ranks: int) -> Samples:
    """Full batches for one epoch of STEPS steps."""
    return Samples(OVERHEAD.sample_shape, STEPS * OVERHEAD.batch_size * ranks)


class Restarting(Task):
    """As raytrain has it: MODEL.FOLDER is where the steps are written down."""

    random_samples = False

    def build_dataset(self, split: str) -> Samples | None:
        return dataset(ranks=2) if split == "train" else None

    def build_model(self, dataset: Samples) -> Counted:
        return Counted()

    def model_func(self, model: Counted, batch: tuple[torch.Tensor, torch.Tensor]) -> ModelReturn:
        inputs, targets = batch
        begin_step(model, Path(self.cfg.MODEL.FOLDER))
        return ModelReturn(cross_entropy(model(inputs), targets))


def train_steps(model: Any, wrapped: Any, optimizer: Any, loader: Any, folder: Path) -> Iterator[int]:
    """Trains from where `model` stands to the end of the epoch; gives the number of steps after each."""
    for inputs, targets in itertools.islice(loader, int(model.steps), None):
        begin_step(model, folder)
        loss = cross_entropy(wrapped(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield int(model.steps)


def by_hand(folder: Path) -> None:
    """Under torchrun: rank 0 writes beside and renames, all load what lies there."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model = Counted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset(2), 2, rank)
    loader = DataLoader(dataset(2), OVERHEAD.batch_size, sampler=sampler)
    for step in train_steps(model, wrapped, optimizer, loader, folder):
        if step % SAVE_EVERY == 0 and rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "part.pt")
            (folder / "part.pt").rename(path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_func(config: dict[str, Any]) -> None:
    """Under Ray Train: rank 0 reports a checkpoint, all take up the one that Ray hands them."""
    import ray.train
    import ray.train.torch
    from ray.train import Checkpoint

    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    model = Counted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as found:
            state = torch.load(Path(found) / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    wrapped = ray.train.torch.prepare_model(model)
    loader = ray.train.torch.prepare_data_loader(DataLoader(dataset(2), OVERHEAD.batch_size, shuffle=True))
    for step in train_steps(model, wrapped, optimizer, loader, Path(config["folder"])):
        if step % SAVE_EVERY == 0:
            with tempfile.TemporaryDirectory() as made:
                saved = None
                if rank == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(state, Path(made) / "checkpoint.pt")
                    saved = Checkpoint.from_directory(made)
                ray.train.report({"step": step}, checkpoint=saved)


def by_ray(folder: Path) -> None:
    """The driver of `train_func`."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train_func,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(
            name="idiom", storage_path=str(folder / "results"), failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


if __name__ == "__main__":
    {"torchrun": by_hand, "ray": by_ray}[sys.argv[1]](Path(sys.argv[2]))
