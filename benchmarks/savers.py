"""The loop that everyone writes, saving model and optimizer as one does in plain torch.

`python -m benchmarks.savers SAVER WORKLOAD WARMUP TIMED EPOCHS AFTER FOLDER`
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.pieces import GRAD_NORM_CLIP, LR, SEED, WEIGHT_DECAY, Assignment

EVERY = 5  # steps between saves
SAVES = "saves.json"


class Saver(Protocol):
    """One way to save."""

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Collective. The loop may go on when this returns."""

    def finish(self) -> None:
        """Collective. Everything is on the disk when this returns."""


class TorchSave:
    """torch.save to a file beside, on the disk before it takes the old one's place."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "checkpoint.pt"

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if rank() > 0:
            return
        beside = self.path.with_suffix(".new")
        with beside.open("wb") as file:
            torch.save(state_of(model, optimizer, step), file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def finish(self) -> None: ...


class AsyncSave:
    """torch.distributed.checkpoint.async_save, one at a time, as PyTorch's recipe has it."""

    def __init__(self, folder: Path) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        self.folder = folder
        self.group = dist.new_group(backend="gloo")  # with gradients on the same gloo group it aborts the process
        self.under_way: Future[Any] | None = None

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.state_dict import get_state_dict

        self.finish()
        of_model, of_optimizer = get_state_dict(model, optimizer)
        state = {"model": of_model, "optimizer": of_optimizer, "step": step}
        begun: Any = async_save(state, checkpoint_id=self.folder / f"step_{step}", process_group=self.group)
        self.under_way = begun

    def finish(self) -> None:
        if self.under_way is not None:
            self.under_way.result()


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    return {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "step": step}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def loader_of(assignment: Assignment, rank: int, ranks: int) -> DataLoader[Any]:
    dataset = assignment.dataset(ranks)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks, rank, seed=SEED)
    return DataLoader(dataset, assignment.workload.batch_size, sampler=sampler)


def train(assignment: Assignment, model: Any, loader: Iterable[Any], saver: Saver | None) -> None:
    """Trains, and leaves in the assignment's folder the weights, the times, and the seconds that saves blocked it."""
    # fused: raytrain's loop steps so by itself, and what is compared here is how they save
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    watch, stalls = assignment.watch(), []
    for step, (inputs, targets) in enumerate(loader, start=1):
        watch.tick()
        loss = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_NORM_CLIP)
        optimizer.step()
        if saver is not None and step % EVERY == 0:
            began = time.perf_counter()
            saver.save(model, optimizer, step)
            stalls.append(time.perf_counter() - began)
    if saver is not None:
        saver.finish()
    on_disk = time.time()
    if rank() == 0:
        (assignment.folder / SAVES).write_text(json.dumps({"stalls": stalls, "on_disk": on_disk}))
        assignment.keep(state_of(model, optimizer, step)["model"], float(loss.detach()))


def main() -> None:
    ways: dict[str, Any] = {"torch-save": TorchSave, "async-save": AsyncSave}
    name, *words = sys.argv[1:]
    assignment = Assignment.of_words(words)
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model, loader = assignment.workload.model(), loader_of(assignment, rank(), ranks)
    saver = ways[name](assignment.folder) if name in ways else None
    train(assignment, DistributedDataParallel(model) if ranks > 1 else model, loader, saver)
    if dist.is_initialized():
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
