"""The loop that everyone writes: DistributedDataParallel under torchrun, or plain torch in one process."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from benchmarks.pieces import GRAD_NORM_CLIP, LR, SEED, WEIGHT_DECAY, Assignment


def train(assignment: Assignment, distributed: bool) -> None:
    """Trains, and leaves the times and the weights in the assignment's folder."""
    torch.set_num_threads(1)
    if distributed:
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    device = torch.device(assignment.device)
    model = assignment.workload.model().to(device)
    stepped = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.AdamW(stepped.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    dataset = assignment.dataset(ranks)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, ranks, rank, seed=SEED)
    pins = device.type == "cuda"
    loader = DataLoader(dataset, assignment.workload.batch_size, sampler=sampler, pin_memory=pins)
    watch = assignment.watch()
    for epoch in range(assignment.span.epochs):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            watch.tick()
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with assignment.autocast():
                loss = cross_entropy(stepped(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(stepped.parameters(), GRAD_NORM_CLIP)
            optimizer.step()
    last_loss = loss.detach() / ranks
    if distributed:
        dist.all_reduce(last_loss)
    if rank == 0:
        assignment.keep(model.state_dict(), float(last_loss))
    if distributed:
        dist.barrier()  # no rank leaves while another still talks to it
        dist.destroy_process_group()


if __name__ == "__main__":
    train(Assignment.of_words(), distributed="WORLD_SIZE" in os.environ)
