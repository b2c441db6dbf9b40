"""The last batch of an epoch: what LOADER.LAST makes of it, and BatchNorm, which can do nothing with one sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raytrain.engine.state import RunState
from raytrain.errors import TaskError
from raytrain.progress import Plan


def last_batch_notes(plan: Plan) -> list[str]:
    """A line for the user if an epoch does not take each sample once, by LOADER.LAST."""
    taken, of = plan.taken(0), f"of {plan.num_samples} samples of an epoch"
    if plan.last == "drop" and taken < plan.num_samples:
        return [f"LOADER.LAST is drop: the last {plan.num_samples - taken} {of}, others in each order, are left out"]
    if plan.last == "pad" and taken > plan.num_samples:
        return [f"LOADER.LAST is pad: the last batch is filled up with the first {taken - plan.num_samples} {of}"]
    return []


def refuse_lone_sample(run: RunState) -> None:
    """From now on the first step fails if the last one would: a batch of one sample has no variance for BatchNorm.

    Whether it has shows in what comes to BatchNorm: of a sample with many pixels or pillars a channel has many values.
    """
    plan, together = run.plan, run.world.size > 1
    if plan.smallest_batch > 1 or (together and run.config["OPTIMIZATION"]["SYNC_BN"]):
        return
    num_samples = min(plan.batch_size, plan.taken(run.progress.cursor) // plan.virtual_workers)
    for name, module in run.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not (
            together and isinstance(module, nn.SyncBatchNorm)
        ):
            _check_first_input(module, name, num_samples, plan)


def _check_first_input(module: nn.Module, name: str, num_samples: int, plan: Plan) -> None:
    """num_samples: of the first batch"""

    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not module.training or not inputs or not isinstance(inputs[0], torch.Tensor) or inputs[0].dim() < 2:
            return
        if not torch.compiler.is_compiling():  # there it costs nothing, and stays
            handle.remove()
        if inputs[0].numel() // max(1, inputs[0].shape[1]) <= num_samples:
            raise TaskError(f"{lone_sample(plan)}, of which BatchNorm {name!r} gets one value per channel, {REMEDY}")

    handle = module.register_forward_pre_hook(check)


REMEDY = "and so no variance. Set LOADER.LAST: drop (or pad), or another OPTIMIZATION.BATCH_SIZE_PER_GPU (2 or more)"


def lone_sample(plan: Plan) -> str:
    shares = f" for {plan.virtual_workers} virtual workers" if plan.virtual_workers > 1 else ""
    cut = f"{plan.num_samples} samples{shares} in batches of {plan.batch_size}"
    return f"{cut} end with a batch of one" if plan.batch_size > 1 else f"{cut} are batches of one"
