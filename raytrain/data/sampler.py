"""Which samples each virtual worker takes next: pure functions of seed, epoch and cursor.

The order is torch's DistributedSampler(seed): a permutation drawn from seed + epoch, padded by
wrapping around to a multiple of the number of virtual workers (LOADER.LAST may say otherwise), dealt
like cards. Since it is dealt, the samples consumed up to a cursor are exactly the first `cursor` of one
global order, whatever the number of virtual workers; the rest can be dealt again to any number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from raytrain.progress import Plan


def epoch_order(num_samples: int, seed: int, epoch: int, shuffle: bool) -> torch.Tensor:
    """Sample ids in the order of this epoch.   Returns (num_samples,) int64."""
    if not shuffle:
        return torch.arange(num_samples)
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    return torch.randperm(num_samples, generator=generator)


def dealt_order(order: torch.Tensor, cursor: int, plan: Plan) -> torch.Tensor:
    """`order` from `cursor` on, wrapped around or cut off so that every virtual worker gets as many.

    Returns (plan.taken(cursor),) int64. With cursor 0 and "keep" it is DistributedSampler's padding.
    """
    rest, taken = order[cursor:], plan.taken(cursor)
    missing = max(0, taken - len(rest))
    repeats = math.ceil(missing / max(1, len(order)))
    return torch.cat([rest[:taken], order.repeat(repeats)[:missing]])


def step_samples(order: torch.Tensor, cursor: int, plan: Plan) -> Iterator[torch.Tensor]:
    """The ids of each remaining step of an epoch.

    Yields (virtual_workers, n) int64 with n = accumulate * batch_size, fewer in the last step.
    Row v is what rank v of a DistributedSampler over `virtual_workers` ranks takes.
    """
    shares = dealt_order(order, cursor, plan).reshape(-1, plan.virtual_workers).t()
    size = plan.batch_size * plan.accumulate
    for start in range(0, shares.shape[1], size):  # not split(): it makes all steps at once, 400 bytes each
        yield shares[:, start : start + size]


def cut(ids: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """`ids` in tuples of `size`, made one by one; the last holds what is left."""
    return (tuple(ids[start : start + size]) for start in range(0, len(ids), size))
