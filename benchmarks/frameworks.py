"""The same work in the loops of Lightning, Accelerate and OpenPCDet, where they are installed.

`torchrun ... -m benchmarks.frameworks accelerate WORKLOAD WARMUP TIMED EPOCHS AFTER FOLDER`, or in one process without
torchrun (not OpenPCDet's).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from benchmarks.pieces import GRAD_NORM_CLIP, LR, SEED, WEIGHT_DECAY, Assignment


def loader_of(assignment: Assignment, collate: Callable[[list[Any]], Any] | None = None) -> DataLoader[Any]:
    """The loader of the hand-written loop, for this rank."""
    rank, ranks = int(os.environ.get("RANK", "0")), ranks_of_all()
    dataset = assignment.dataset(ranks)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks, rank, seed=SEED)
    pins = assignment.device == "cuda"
    return DataLoader(dataset, assignment.workload.batch_size, sampler=sampler, collate_fn=collate, pin_memory=pins)


def ranks_of_all() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def keep(assignment: Assignment, model: torch.nn.Module, loss: torch.Tensor) -> None:
    """Collective. Rank 0 writes what the run ended with."""
    if ranks_of_all() == 1:
        assignment.keep(model.state_dict(), float(loss))
        return
    last_loss = loss.detach() / dist.get_world_size()
    dist.all_reduce(last_loss)
    if dist.get_rank() == 0:
        assignment.keep(model.state_dict(), float(last_loss))
    dist.barrier()  # no rank leaves while another still talks to it


def accelerate(assignment: Assignment) -> None:
    from accelerate import Accelerator

    mixed = "bf16" if assignment.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=assignment.device == "cpu", mixed_precision=mixed)
    model = assignment.workload.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    stepped, optimizer = accelerator.prepare(model, optimizer)
    loader = loader_of(assignment)  # not prepared, which would shard it again
    watch = assignment.watch()
    for epoch in range(assignment.span.epochs):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for inputs, targets in loader:
            watch.tick()
            inputs, targets = (each.to(accelerator.device, non_blocking=True) for each in (inputs, targets))
            with accelerator.autocast():
                loss = cross_entropy(stepped(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(stepped.parameters(), GRAD_NORM_CLIP)
            optimizer.step()
    keep(assignment, model, loss)
    if dist.is_initialized():
        dist.destroy_process_group()


def lightning(assignment: Assignment) -> None:
    import lightning

    watch = assignment.watch()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = assignment.workload.model()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            inputs, targets = batch
            watch.tick()
            self.last_loss = cross_entropy(self.model(inputs), targets)
            return self.last_loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)

        def on_fit_end(self) -> None:  # the process group still stands
            keep(assignment, self.model, self.last_loss)

    trainer = lightning.Trainer(
        accelerator="gpu" if assignment.device == "cuda" else "cpu",
        devices=ranks_of_all(),
        strategy="ddp" if ranks_of_all() > 1 else "auto",
        precision="bf16-mixed" if assignment.precision == "bf16" else "32-true",
        max_epochs=assignment.span.epochs,
        gradient_clip_val=GRAD_NORM_CLIP,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(Module(), loader_of(assignment))


def openpcdet(assignment: Assignment) -> None:
    """tools/train_utils of OpenPCDet, epoch by epoch, without its checkpoints and its tensorboard."""
    import tqdm
    from easydict import EasyDict
    from pcdet.utils import commu_utils
    from torch.nn.parallel import DistributedDataParallel
    from train_utils.train_utils import train_one_epoch

    last_loss = torch.zeros(())

    def mean_over_ranks(value: float) -> float:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return sum(values) / len(values)

    def collate(samples: list[Any]) -> dict[str, Any]:
        inputs, targets = default_collate(samples)
        return {"inputs": inputs, "targets": targets, "batch_size": len(targets)}

    def model_func(model: torch.nn.Module, batch: dict[str, Any]) -> Any:
        nonlocal last_loss
        watch.tick()
        last_loss = cross_entropy(model(batch["inputs"]), batch["targets"])
        return last_loss, {}, {}

    commu_utils.average_reduce_value = mean_over_ranks  # its own is the same on a GPU, and fails without one
    dist.init_process_group("gloo")
    model = assignment.workload.model()
    stepped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(stepped.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = SimpleNamespace(step=lambda *place: None)  # takes the step; in newer versions the epoch too
    loader, watch, step = loader_of(assignment, collate), assignment.watch(), 0
    with tqdm.trange(assignment.span.epochs) as bar:
        for epoch in bar:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            step = train_one_epoch(
                stepped,
                optimizer,
                loader,
                model_func,
                lr_scheduler=schedule,
                accumulated_iter=step,
                optim_cfg=EasyDict(GRAD_NORM_CLIP=GRAD_NORM_CLIP),
                rank=dist.get_rank(),
                tbar=bar,
                total_it_each_epoch=len(loader),
                dataloader_iter=iter(loader),
            )
    keep(assignment, model, last_loss)
    dist.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    loops = {"accelerate": accelerate, "lightning": lightning, "openpcdet": openpcdet}
    loops[sys.argv[1]](Assignment.of_words(sys.argv[2:]))


if __name__ == "__main__":
    main()
