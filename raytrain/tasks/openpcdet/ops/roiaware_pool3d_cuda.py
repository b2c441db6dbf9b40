"""pcdet.ops.roiaware_pool3d.roiaware_pool3d_cuda: features of the points in each cell of each box."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.boxes import inside
from raytrain.tasks.openpcdet.ops.neighbours import firsts, ranks_of_sorted

MAX, AVG = 0, 1
MARGIN, MARGIN_CPU = 1e-5, 1e-2  # metres, the kernels' and the loop's


def forward(
    rois: Tensor,
    pts: Tensor,
    pts_feature: Tensor,
    argmax: Tensor,
    pts_idx_of_voxels: Tensor,
    pooled_features: Tensor,
    pool_method: int,
) -> int:
    """Max or mean of the features of the points in each cell of each box; 0 in empty cells.

    rois: (N, 7), pts: (P, 3), pts_feature: (P, C).   Written: pooled_features and argmax (N, X, Y, Z, C), argmax being
    the point that the maximum is of, -1 in empty cells; pts_idx_of_voxels (N, X, Y, Z, S): how many points count in a
    cell, and which: the first S - 1.
    """
    *cells, size = pts_idx_of_voxels.shape
    voxel, point = _cells_of(rois, pts, tuple(cells))
    voxel, point, rank = firsts(voxel, point, max(1, len(pts)), size - 1)
    members = pts_idx_of_voxels.view(-1, size)
    members[voxel, rank + 1] = point.to(members.dtype)
    members[:, 0].scatter_add_(0, voxel, torch.ones_like(voxel, dtype=members.dtype))

    num_channels = pts_feature.shape[1]
    filled, of = torch.unique_consecutive(voxel, return_inverse=True)  # (V,), (Q,)
    features, of = pts_feature[point], of[:, None].expand(-1, num_channels)
    pooled, best = pooled_features.view(-1, num_channels), argmax.view(-1, num_channels)
    best.fill_(-1)
    if pool_method == AVG:
        sums = features.new_zeros(len(filled), num_channels).scatter_add_(0, of, features)
        pooled[filled] = sums / members[filled, :1]
        return 1
    peaks = features.new_full((len(filled), num_channels), -torch.inf).scatter_reduce_(0, of, features, "amax")
    none = len(pts)
    holds = (features == peaks.gather(0, of)) & (features > -torch.inf)
    candidates = torch.where(holds, point[:, None], none)
    first = candidates.new_full(peaks.shape, none).scatter_reduce_(0, of, candidates, "amin")
    pooled[filled] = torch.where(first < none, peaks, 0)
    best[filled] = torch.where(first < none, first, -1).to(best.dtype)
    return 1


def backward(pts_idx_of_voxels: Tensor, argmax: Tensor, grad_out: Tensor, grad_in: Tensor, pool_method: int) -> int:
    """Adds to grad_in (P, C) what grad_out (N, X, Y, Z, C) says of the points' features."""
    size, num_channels = pts_idx_of_voxels.shape[-1], grad_out.shape[-1]
    grad = grad_out.reshape(-1, num_channels)
    if pool_method == MAX:
        best = argmax.reshape(-1, num_channels).long()
        grad_in.scatter_add_(0, best.clamp(min=0), torch.where(best >= 0, grad, 0))
        return 1
    members = pts_idx_of_voxels.view(-1, size)
    filled = members[:, 0].nonzero().squeeze(1)
    counts = members[filled, 0].long()
    voxel = filled.repeat_interleave(counts)
    point = members[voxel, ranks_of_sorted(voxel) + 1].long()
    grad_in.index_add_(0, point, grad[voxel] / members[voxel, :1])
    return 1


def points_in_boxes_gpu(boxes: Tensor, pts: Tensor, box_idx_of_points: Tensor) -> int:
    """box_idx_of_points (B, N): the first box that a point is in, unchanged (-1) in none.   boxes: (B, M, 7)."""
    for of_sample, in_sample, index in zip(boxes, pts, box_idx_of_points, strict=True):
        rows, columns, _ = inside(in_sample, of_sample, MARGIN)
        first = torch.full_like(index, len(of_sample), dtype=torch.int64).scatter_reduce_(0, columns, rows, "amin")
        index.copy_(torch.where(first < len(of_sample), first, index))
    return 1


def points_in_boxes_cpu(boxes: Tensor, pts: Tensor, pts_indices: Tensor) -> int:
    """pts_indices (M, N): 1 where a point is in a box.   boxes: (M, 7), pts: (N, 3)."""
    pts_indices.zero_()
    rows, columns, _ = inside(pts, boxes, MARGIN_CPU)
    pts_indices[rows, columns] = 1
    return 1


def _cells_of(rois: Tensor, pts: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The flat index within (N, X, Y, Z) of the cell of each point in a box, and the point: (Q,) each."""
    box, point, local = inside(pts, rois, MARGIN)
    counts = local.new_tensor(shape[1:])
    size = rois[box, 3:6]
    cell = ((local + size / 2) / (size / counts)).nan_to_num().long()  # towards 0, as C's int()
    x, y, z = torch.minimum(cell.clamp(min=0), counts.long() - 1).unbind(1)
    return ((box * shape[1] + x) * shape[2] + y) * shape[3] + z, point
