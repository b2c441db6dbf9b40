"""Tensors that every process takes over from rank 0: a model's buffers, as DistributedDataParallel broadcasts them.

A module may put a tensor of another shape in a buffer's place, or add one, and not alike on every
rank: a cache as long as the longest sequence so far. So what travels is laid out once, by what was
there when training began, and each process takes of it what fits what it has now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

LINE = 64  # bytes: each tensor begins on a cache line


def num_bytes(firsts: Mapping[Any, torch.Tensor]) -> int:
    """That `room_in` takes for them."""
    return sum(rounded(t.numel() * t.element_size(), LINE) for t in firsts.values())


def room_in(memory: torch.Tensor, firsts: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """A tensor like each of `firsts`, all of them in `memory` (bytes)."""
    room, at = {}, 0
    for key, first in firsts.items():
        size = first.numel() * first.element_size()
        room[key] = memory[at : at + size].view(first.dtype).view(first.shape)
        at += rounded(size, LINE)
    return room


def rounded(size: int, to: int) -> int:
    """The next multiple of `to`."""
    return -(-size // to) * to


def copy_fitting(to: Mapping[Any, torch.Tensor], values: Mapping[Any, torch.Tensor]) -> None:
    """Each of `to` becomes the value of its key, if there is one of its shape and dtype."""
    fitting = [key for key, tensor in to.items() if fits(tensor, values.get(key))]
    if fitting:
        torch._foreach_copy_([to[key] for key in fitting], [values[key] for key in fitting])


def fits(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.shape == other.shape and tensor.dtype is other.dtype


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether values can be copied into it: not if it is sparse, or one number stands for several (`expand`)."""
    if tensor.layout is not torch.strided:
        return False
    strides = tensor.stride()
    return 0 not in strides or all(stride or size < 2 for size, stride in zip(tensor.shape, strides, strict=True))
