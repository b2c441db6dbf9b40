"""pcdet.ops.bev_pool.bev_pool_ext: sums of the camera features that fall into each cell of the map."""

from __future__ import annotations

import torch
from torch import Tensor


def bev_pool_forward(
    x: Tensor, geom_feats: Tensor, interval_lengths: Tensor, interval_starts: Tensor, b: int, d: int, h: int, w: int
) -> Tensor:
    """(B, D, H, W, C): the sum over each interval, at the interval's cell.

    x: (N, C) sorted by cell; geom_feats: (N, 4), a cell's h, w, d and b; intervals: (I,) each, of rows of one cell.
    """
    out = x.new_zeros(b * d * h * w, x.shape[1])
    interval = torch.arange(len(interval_starts), device=x.device).repeat_interleave(interval_lengths.long())
    sums = x.new_zeros(len(interval_starts), x.shape[1]).index_add_(0, interval, x)
    out[_cells(geom_feats[interval_starts.long()], d, h, w)] = sums
    return out.view(b, d, h, w, -1)


def bev_pool_backward(
    out_grad: Tensor,
    geom_feats: Tensor,
    interval_lengths: Tensor,
    interval_starts: Tensor,
    b: int,
    d: int,
    h: int,
    w: int,
) -> Tensor:
    """(N, C): each row's share of out_grad (B, D, H, W, C), that of its cell."""
    cells = _cells(geom_feats[interval_starts.long()], d, h, w)
    return out_grad.reshape(b * d * h * w, -1)[cells.repeat_interleave(interval_lengths.long())]


def _cells(geom_feats: Tensor, d: int, h: int, w: int) -> Tensor:
    of_h, of_w, of_d, of_b = geom_feats.long().unbind(1)
    return ((of_b * d + of_d) * h + of_h) * w + of_w
