"""Where each parameter lies in flat buffers, how its gradient gets there, and which models fit in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

ALIGN = 16  # elements: vector loads of a view begin on a cache line
ROW = 4096  # a norm is of the norms of rows this long; one f32 sum over 50 million squares is 0.4 % wrong
FLAT_DTYPES = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat buffer of its dtype."""

    dtype: torch.dtype
    start: int
    stop: int
    shape: torch.Size
    stride: tuple[int, ...]


class Layout:
    """Where each of `params` lies in one flat buffer per dtype.

    sizes: elements of each buffer, a whole number of ROWs; what lies between parameters stays zero
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.places: list[Place] = []
        ends: dict[torch.dtype, int] = {}
        for p in params:
            start = ends.get(p.dtype, 0)
            stop = start + p.numel()
            # The strides of a dense tensor are kept (channels_last); any other becomes contiguous.
            self.places.append(Place(p.dtype, start, stop, p.shape, torch.empty_like(p).stride()))
            ends[p.dtype] = -(-stop // ALIGN) * ALIGN
        self.sizes = {dtype: -(-end // ROW) * ROW for dtype, end in ends.items()}

    def views(self, buffers: Mapping[torch.dtype, torch.Tensor]) -> list[torch.Tensor]:
        """Each parameter's part of `buffers`, in its own shape and strides."""
        return [
            torch.as_strided(buffers[p.dtype], p.shape, p.stride, p.start + buffers[p.dtype].storage_offset())
            for p in self.places
        ]


def copy_all(views: Sequence[torch.Tensor], grads: Sequence[Any]) -> None:
    """Each of `grads` into its view; a sparse one becomes dense there."""
    if views:
        torch._foreach_copy_(list(views), [dense(grad) for grad in grads])


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A sparse one as what it stands for."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def collect(views: Sequence[torch.Tensor], params: Sequence[nn.Parameter]) -> list[bool]:
    """Copies each parameter's gradient into its view, -0.0 where there is none; which parameters have one."""
    grads = [p.grad for p in params]
    used = [grad is not None for grad in grads]
    if all(used):
        copy_all(views, grads)
        return used
    copy_all([v for v, u in zip(views, used, strict=True) if u], [g for g in grads if g is not None])
    for view in (v for v, u in zip(views, used, strict=True) if not u):
        view.fill_(-0.0)
    return used


def why_not_flat(model: nn.Module, params: Sequence[nn.Parameter], scaled: bool) -> str | None:
    """What keeps `params` out of flat buffers; None if nothing does.

    scaled: whether the loss is scaled (fp16), for which torch's GradScaler needs torch's optimizer
    """
    if scaled:
        return "fp16's loss scaler works on torch's own optimizer"
    names = {p: name for name, p in model.named_parameters()}
    for p in params:
        if p.dtype not in FLAT_DTYPES:
            return f"{names[p]} is {p.dtype}"
    if len({p.device for p in params}) > 1:
        return "the parameters lie on several devices"
    if any(type(p) is not nn.Parameter for p in params):
        odd = next(p for p in params if type(p) is not nn.Parameter)
        return f"{names[odd]} is a {type(odd).__name__}"
    return _memory_shared(model, params)


def _memory_shared(model: nn.Module, params: Sequence[nn.Parameter]) -> str | None:
    """Two tensors in one memory stay so only where they are."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    moved = {id(p) for p in params}
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent_bytes(t), name, id(t) in moved)
        for name, t in tensors.items()
        if t.numel() and t.layout is torch.strided
    )
    end, owner, owner_moves = 0, "", False
    for begin, stop, name, moves in spans:
        if begin < end and (moves or owner_moves):
            return f"{owner} and {name} share memory"
        if stop > end:
            end, owner, owner_moves = stop, name, moves
    return None


def _extent_bytes(tensor: torch.Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()
