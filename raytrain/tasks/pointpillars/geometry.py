"""How much boxes overlap, in the plane and in space, and the suppression of those that overlap a better one.

A box is (x, y, z, dx, dy, dz, heading): its centre, its size along and across the heading and its height in metres, and
the heading, counter-clockwise from x, in radians. Plain torch, on any device, in float32 or float64; no gradients.
In either type an IoU is within 1e-5 of exact polygon clipping.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 16384  # pairs at a time: their edges then stay in a core's cache
BLOCK = 256  # boxes that suppression settles among themselves before it looks at the rest


def limit_period(angle: Tensor, offset: float = 0.5, period: float = math.pi) -> Tensor:
    """The same angle within [-offset * period, (1 - offset) * period)."""
    return angle - torch.floor(angle / period + offset) * period


def overlap_bev(a: Tensor, b: Tensor) -> Tensor:
    """m^2 that boxes share when seen from above.   a: (N, 7), b: (M, 7).   Returns (N, M)."""
    return _of_all(overlap_paired, a, b)


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union seen from above, 0 to 1.   a: (N, 7), b: (M, 7).   Returns (N, M)."""
    return _of_all(iou_bev_paired, a, b)


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of the volumes, 0 to 1.   a: (N, 7), b: (M, 7).   Returns (N, M)."""
    return _of_all(iou_3d_paired, a, b)


def circles_touch(a: Tensor, b: Tensor) -> Tensor:
    """Whether the circles round two boxes meet, seen from above: where not, nothing overlaps.   (..., 7) each."""
    reach = (a[..., 3:5].norm(dim=-1) + b[..., 3:5].norm(dim=-1)) / 2
    return (a[..., 0] - b[..., 0]) ** 2 + (a[..., 1] - b[..., 1]) ** 2 <= reach**2


def overlap_paired(a: Tensor, b: Tensor) -> Tensor:
    """m^2 that the two boxes of each pair share when seen from above.   a, b: (P, 7).   Returns (P,)."""
    if len(a) <= CHUNK:
        return _overlap(a, b)
    return torch.cat([_overlap(*some) for some in zip(a.split(CHUNK), b.split(CHUNK), strict=True)])


def iou_bev_paired(a: Tensor, b: Tensor) -> Tensor:
    """IoU seen from above of the two boxes of each pair.   a, b: (P, 7).   Returns (P,)."""
    return _ratio(overlap_paired(a, b), a[:, 3] * a[:, 4], b[:, 3] * b[:, 4])


def iou_3d_paired(a: Tensor, b: Tensor) -> Tensor:
    """IoU of the volumes of the two boxes of each pair.   a, b: (P, 7).   Returns (P,)."""
    above, half_a, half_b = a[:, 2] - b[:, 2], a[:, 5] / 2, b[:, 5] / 2  # from b's centre: no digits lost
    tall = torch.minimum(above + half_a, half_b) - torch.maximum(above - half_a, -half_b)
    return _ratio(overlap_paired(a, b) * tall.clamp(min=0), a[:, 3:6].prod(1), b[:, 3:6].prod(1))


def nearest_bev(boxes: Tensor) -> Tensor:
    """Each box seen from above and turned to the nearest axis: (..., 7) -> (..., 4), x1 y1 x2 y2."""
    across = limit_period(boxes[..., 6]).abs() >= math.pi / 4
    half = torch.where(across[..., None], boxes[..., 3:5].flip(-1), boxes[..., 3:5]) / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def iou_axis_aligned(a: Tensor, b: Tensor) -> Tensor:
    """IoU of rectangles x1 y1 x2 y2.   a: (..., N, 4), b: (..., M, 4).   Returns (..., N, M)."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])
    height = torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])
    shared = width.clamp(min=0) * height.clamp(min=0)
    area_a, area_b = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b))
    return shared / (area_a + area_b - shared).clamp(min=1e-6)  # the floor is OpenPCDet's


def nms(boxes: Tensor, scores: Tensor, threshold: float, pre_max: int = 4096, post_max: int = 500) -> Tensor:
    """The boxes that no better kept box overlaps by more than the threshold, the best first.

    boxes: (N, 7); scores: (N,), of which the pre_max highest take part; threshold: IoU seen from above.
    Returns (K,) int64 row numbers, K <= post_max.

    Blocks of the best are settled among themselves; then only what they keep is held against the rest. So crowds cost
    little (one box stays of each) and so do scattered boxes (few touch).
    """
    waiting = scores.argsort(descending=True, stable=True)[:pre_max]
    kept = [waiting[:0]]
    num_kept = 0
    while len(waiting) and num_kept < post_max:
        block, waiting = waiting[:BLOCK], waiting[BLOCK:]
        among = (iou_bev(boxes[block], boxes[block]) > threshold).cpu().numpy()
        block = block[torch.from_numpy(_unsuppressed(among)).to(block.device)]
        waiting = waiting[~(iou_bev(boxes[block], boxes[waiting]) > threshold).any(0)]
        kept.append(block)
        num_kept += len(block)
    return torch.cat(kept)[:post_max]


def _unsuppressed(over: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,): which of N boxes, best first, stay, where over (N, N) tells which overlap."""
    stays = np.ones(len(over), dtype=np.bool_)
    for rank in range(len(over)):
        if stays[rank]:
            stays[rank + 1 :] &= ~over[rank, rank + 1 :]
    return stays


def _of_all(paired: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A paired measure of every a (N, 7) with every b (M, 7): (N, M); 0, not computed, where boxes are far apart."""
    rows, columns = circles_touch(a[:, None], b[None]).nonzero(as_tuple=True)
    values = a.new_zeros(len(a), len(b))
    values[rows, columns] = paired(a[rows], b[columns])
    return values


def _ratio(shared: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union from the intersection and the two sizes, (P,) each; 0 where both sizes are 0."""
    return (shared / (a + b - shared).clamp(min=torch.finfo(shared.dtype).tiny)).clamp(max=1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """`overlap_paired` of one chunk.

    In b's own frame b is |x| <= w, |y| <= h, and above each x the part of a within b reaches from one clamped y of a's
    outline to the other. So the area is the integral of clamp(y) d clamp(x) along that outline, clockwise: a closed
    form per edge. Nothing is sorted and no cases are told apart, so coinciding edges and corners need no tolerance.
    """
    x0, y0 = _corners_within(a, b)  # (4, P), counter-clockwise
    x1, y1 = x0.roll(-1, 0), y0.roll(-1, 0)
    w, h = b[:, 3] / 2, b[:, 4] / 2  # (P,)
    left, right = x0.clamp(-w, w), x1.clamp(-w, w)
    run = x1 - x0
    slope = (y1 - y0) / torch.where(run.abs() < 1e-12, 1.0, run)  # an upright edge has no area below it
    start, end = y0 + (left - x0) * slope, y1 + (right - x1) * slope
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    rise = (high - low).clamp(min=1e-12)
    below, above = ((-h - low) / rise).clamp(0, 1), ((high - h) / rise).clamp(0, 1)  # shares of the edge beyond b
    within = (low.clamp(-h, h) + high.clamp(-h, h)) / 2  # the mean of y over the share between them
    return ((left - right) * (h * (above - below) + (1 - above - below) * within)).sum(0).clamp(min=0)


def _corners_within(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x and y, (4, P) each, of the corners of a in the frame of b, counter-clockwise."""
    cos, sin = b[:, 6].cos(), b[:, 6].sin()
    x, y = a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]
    x, y = x * cos + y * sin, y * cos - x * sin
    turn = a[:, 6] - b[:, 6]
    cos, sin = turn.cos(), turn.sin()
    half = a.new_tensor([[1, -1, -1, 1], [1, 1, -1, -1]])[:, :, None] / 2  # (2, 4, 1)
    along, across = half[0] * a[:, 3], half[1] * a[:, 4]  # (4, P)
    return x + along * cos - across * sin, y + along * sin + across * cos
