"""torch_scatter's reductions by torch's own scatter_reduce, with gradients.

Each takes src, the index of each entry's group along `dim` (of src's shape, or one that broadcasts to it), `out` to
write into, and `dim_size`, the number of groups (one more than the highest index unless given).
"""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_sum(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Sum of each group; 0 of an empty one."""
    index = _broadcast(index, src, dim)
    if out is None:
        out = src.new_zeros(_shape(src, index, dim, dim_size))
    return out.scatter_add_(dim, index, src)


scatter_add = scatter_sum


def scatter_mean(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    """Mean of each group; 0 of an empty one. Of integers the floor."""
    total = scatter_sum(src, index, dim, out, dim_size)
    index = _broadcast(index, src, dim)
    count = torch.zeros_like(total).scatter_add_(dim, index, torch.ones_like(src)).clamp_(min=1)
    mean = total / count if total.is_floating_point() else total.div(count, rounding_mode="floor")
    return mean if out is None else out.copy_(mean)


def scatter_max(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Largest of each group and where along `dim` it stands; 0 and src's length in empty groups."""
    return _extreme("amax", src, index, dim, out, dim_size)


def scatter_min(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Smallest of each group and where along `dim` it stands; 0 and src's length in empty groups."""
    return _extreme("amin", src, index, dim, out, dim_size)


def scatter(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    reduce: str = "sum",
) -> Tensor:
    """One of the reductions "sum", "add", "mean", "max" or "min" by name."""
    if reduce in ("max", "min"):
        return (scatter_max if reduce == "max" else scatter_min)(src, index, dim, out, dim_size)[0]
    known = {"sum": scatter_sum, "add": scatter_sum, "mean": scatter_mean}
    if reduce not in known:
        raise ValueError(f"reduce is {reduce!r}; it is one of sum, add, mean, max, min")
    return known[reduce](src, index, dim, out, dim_size)


def _extreme(
    name: str, src: Tensor, index: Tensor, dim: int, out: Tensor | None, dim_size: int | None
) -> tuple[Tensor, Tensor]:
    index = _broadcast(index, src, dim)
    shape = list(out.shape) if out is not None else _shape(src, index, dim, dim_size)
    with torch.no_grad():  # the winner is looked up again below: its gradient goes to one entry, not to all equal ones
        best = torch.zeros(shape, dtype=src.dtype, device=src.device)
        best.scatter_reduce_(dim, index, src.detach(), name, include_self=False)
        length = src.shape[dim]
        sizes = [1] * src.dim()
        sizes[dim] = length
        place = torch.arange(length, device=src.device).view(sizes).expand_as(src)
        place = place.masked_fill(src.detach() != best.gather(dim, index), length)
        first = torch.full(shape, length, device=src.device).scatter_reduce_(dim, index, place, "amin")
        empty = first == length
    if not length:
        return best if out is None else out, first
    value = src.gather(dim, first.clamp(max=length - 1)).masked_fill(empty, 0)
    if out is None:
        return value, first
    better = ~empty & ((value > out) if name == "amax" else (value < out))
    return out.copy_(torch.where(better, value, out)), torch.where(better, first, length)


def _broadcast(index: Tensor, src: Tensor, dim: int) -> Tensor:
    if index.dim() == 1 and src.dim() > 1:
        sizes = [1] * src.dim()
        sizes[dim] = len(index)
        index = index.view(sizes)
    while index.dim() < src.dim():
        index = index.unsqueeze(-1)
    return index.expand_as(src)


def _shape(src: Tensor, index: Tensor, dim: int, dim_size: int | None) -> list[int]:
    shape = list(src.shape)
    shape[dim] = dim_size if dim_size is not None else int(index.max()) + 1 if index.numel() else 0
    return shape
