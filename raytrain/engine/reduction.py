"""What is asked of a way to add up the gradients of all processes, and where a model's buffers travel with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raytrain.engine.buffers import fits
from raytrain.engine.world import World

LINE = 64  # bytes: tensors in staging begin on a cache line


class Reduction:
    """One process alone: what it has is the sum.

    nodes:   by dtype, the flat buffers that this process fills after `open` and before `reduce`: the first of them only
             with the sum of all its virtual workers, where it has one node of the tree (engine/tree.py)
    sums:    by dtype, where `reduce` leaves the sum over all processes, the same bits on each
    staging: where a model's buffers travel, which shall be rank 0's; one that no longer fits stays as it last did

    A module may put a tensor of another shape in a buffer's place, or add one, and not alike on every rank: a cache as
    long as the longest sequence so far. So staging is laid out once, by what was there when training began, and each
    process takes of it what fits what it has now.
    """

    kind = "none"

    def __init__(self, sizes: Mapping[torch.dtype, int], world: World, num_nodes: int = 1) -> None:
        self.world = world
        self.nodes = [zeros(sizes, world.device) for _ in range(num_nodes)]
        self.sums: Mapping[torch.dtype, torch.Tensor] = self.nodes[0]
        self.staging: dict[Any, torch.Tensor] = {}

    def stage(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Have a place in staging for each of `buffers`, with what it is on rank 0, and for no others."""

    def open(self) -> None:
        """From here on `nodes` may be written."""

    def reduce(self, buffers: Mapping[Any, torch.Tensor]) -> None:
        """Collective. Fill `sums`, and make each of `buffers` that fits its staging what it is on rank 0."""

    def unstaged(self, buffers: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        """Those of `buffers` that `reduce` leaves as they are."""
        return {key: buffer for key, buffer in buffers.items() if not fits(buffer, self.staging.get(key))}


def zeros(sizes: Mapping[torch.dtype, int], device: torch.device) -> dict[torch.dtype, torch.Tensor]:
    """Flat buffers of their own."""
    return {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}


def staging_bytes(buffers: Mapping[Any, torch.Tensor]) -> int:
    """That `staging_in` takes for them."""
    return sum(rounded(buffer.numel() * buffer.element_size(), LINE) for buffer in buffers.values())


def staging_in(memory: torch.Tensor, buffers: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """A tensor like each of `buffers`, all of them in `memory` (bytes)."""
    staging, at = {}, 0
    for key, buffer in buffers.items():
        size = buffer.numel() * buffer.element_size()
        staging[key] = memory[at : at + size].view(buffer.dtype).view(buffer.shape)
        at += rounded(size, LINE)
    return staging


def rounded(size: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to
