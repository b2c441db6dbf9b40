"""A model that is, when a block ends, what it was before, whatever has been done to it in there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from raytrain.engine.buffers import fits, is_writable


@contextmanager
def model_kept(model: nn.Module) -> Iterator[list[str]]:
    """Parameters and buffers get back the values that they had; the list then names those that had others.

    A buffer that is another one by then, in another shape (a cache that has grown), stays.
    """
    changed: list[str] = []
    before = {name: (tensor.data, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors_of(model).items()}
    try:
        yield changed
    finally:
        now = tensors_of(model)
        for name in [name for name in before if name in now]:
            tensor, (data, value) = now[name], before[name]
            if fits(tensor, value) and not same_bits(tensor.detach().cpu(), value):
                changed.append(name)
                data.copy_(value)
                if tensor.data_ptr() != data.data_ptr():
                    tensor.data = data


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if is_writable(tensor) and not tensor.is_meta and tensor.numel()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Also where both are the same NaN."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
