"""Ray Train as its documentation has it ("Get Started with Distributed Training using PyTorch"), for the same work.

As there: TorchTrainer with its defaults, prepare_model, prepare_data_loader, and ray.train.report with a
checkpoint; here after the last epoch only, so that no checkpoint falls into the timed part.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.pieces import GRAD_NORM_CLIP, LR, WEIGHT_DECAY, Assignment


def train_func(config: dict[str, Any]) -> None:
    """What every worker runs; `config` holds the words of the assignment."""
    assignment = Assignment.of_words(config["words"])
    torch.set_num_threads(1)
    context = ray.train.get_context()
    model: Any = ray.train.torch.prepare_model(assignment.workload.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    dataset = assignment.dataset(context.get_world_size())
    loader = DataLoader(dataset, batch_size=assignment.workload.batch_size, shuffle=True)
    loader = ray.train.torch.prepare_data_loader(loader)
    watch = assignment.watch()
    for epoch in range(assignment.span.epochs):
        if context.get_world_size() > 1:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for inputs, targets in loader:
            watch.tick()
            loss = cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_NORM_CLIP)
            optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.module.state_dict(), os.path.join(folder, "model.pt"))  # noqa: PTH118 (as documented)
        ray.train.report({"loss": loss.item()}, checkpoint=Checkpoint.from_directory(folder))
    last_loss = loss.detach() / context.get_world_size()
    torch.distributed.all_reduce(last_loss)
    if context.get_world_rank() == 0:
        assignment.keep(model.module.state_dict(), float(last_loss))


def main() -> None:
    assignment = Assignment.of_words()
    trainer = TorchTrainer(
        train_func,
        train_loop_config={"words": assignment.words()},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(name="idiom", storage_path=str(assignment.folder / "ray_results")),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
