"""Tensors that every process takes over from rank 0: a model's buffers, as DistributedDataParallel broadcasts them.

A module may put a tensor of another shape in a buffer's place, or add one, and not alike on every
rank: a cache as long as the longest sequence so far. So what travels is laid out once, by what was
there when training began, and each process takes of it what fits what it has now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


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


class Snapshot:
    """Copies of tensors `of`, taken anew by `take`: small ones together, since a copy of each costs 2 us.

    values: by the keys of `of`, as they were taken last
    """

    def __init__(self, of: Mapping[Any, torch.Tensor]) -> None:
        self.of = of
        self.values: dict[Any, torch.Tensor] = {}
        self._together: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        small = {key: tensor for key, tensor in of.items() if tensor.is_contiguous()}
        for dtype in {tensor.dtype for tensor in small.values()}:
            parts = {key: tensor.view(-1) for key, tensor in small.items() if tensor.dtype is dtype}
            memory = torch.cat(list(parts.values()))
            views = memory.split([part.numel() for part in parts.values()])
            self.values |= {key: view.view(of[key].shape) for key, view in zip(parts, views, strict=True)}
            self._together.append((memory, list(parts.values())))
        self._alone = {key: tensor for key, tensor in of.items() if key not in small}
        self.values |= {key: tensor.clone() for key, tensor in self._alone.items()}

    @torch.no_grad()
    def take(self) -> None:
        for memory, parts in self._together:
            torch.cat(parts, out=memory)
        for key, tensor in self._alone.items():
            self.values[key].copy_(tensor)


def put_back(tensors: Mapping[Any, torch.Tensor], before: Mapping[Any, torch.Tensor], bad: torch.Tensor) -> None:
    """Where the scalar `bad` is not 0, each of `tensors` becomes its value `before`; without waiting for the device."""
    fitting = [key for key, tensor in tensors.items() if fits(tensor, before.get(key))]
    for dtype in {tensors[key].dtype for key in fitting}:  # together: a launch for each would take longer than a step
        keys = [key for key in fitting if tensors[key].dtype is dtype]
        was, now = (torch.cat([side[key].reshape(-1) for key in keys]) for side in (before, tensors))
        parts = torch.where(bad > 0, was, now).split([tensors[key].numel() for key in keys])
        shaped = [part.view(tensors[key].shape) for key, part in zip(keys, parts, strict=True)]
        torch._foreach_copy_([tensors[key] for key in keys], shaped)
