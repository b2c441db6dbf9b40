"""pcdet.ops.pointnet2.pointnet2_stack.pointnet2_stack_cuda: PointNet++ on stacked batches (N1 + N2 ..., 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.neighbours import PAIRS, ball, ranks_of_sorted, squared_distances, three_nearest
from raytrain.tasks.openpcdet.ops.pointnet2_batch_cuda import farthest_point_sampling_wrapper
from raytrain.tasks.openpcdet.ops.sampling import farthest_points
from raytrain.tasks.openpcdet.ops.segments import begins_of, segments
from raytrain.tasks.openpcdet.ops.vector_pool import (
    query_stacked_local_neighbor_idxs_wrapper_stack,
    query_three_nn_by_stacked_local_idxs_wrapper_stack,
    vector_pool_grad_wrapper,
    vector_pool_wrapper,
)

__all__ = [
    "ball_query_wrapper",
    "farthest_point_sampling_wrapper",
    "group_points_grad_wrapper",
    "group_points_wrapper",
    "query_stacked_local_neighbor_idxs_wrapper_stack",
    "query_three_nn_by_stacked_local_idxs_wrapper_stack",
    "stack_farthest_point_sampling_wrapper",
    "three_interpolate_grad_wrapper",
    "three_interpolate_wrapper",
    "three_nn_wrapper",
    "vector_pool_grad_wrapper",
    "vector_pool_wrapper",
    "voxel_query_wrapper",
]


def ball_query_wrapper(
    B: int,  # noqa: N803 the kernels' names, here and below
    M: int,  # noqa: N803
    radius: float,
    nsample: int,
    new_xyz: Tensor,
    new_xyz_batch_cnt: Tensor,
    xyz: Tensor,
    xyz_batch_cnt: Tensor,
    idx: Tensor,
) -> int:
    """idx (M1 + M2 ..., nsample): the first points nearer than the radius, by their number within the sample.

    Filled up with the first; idx[:, 0] is -1 where there is none, the rest untouched.   new_xyz: (M1 + M2 ..., 3)
    """
    for places, points in segments(new_xyz_batch_cnt, xyz_batch_cnt):
        near, counts = ball(xyz[points], new_xyz[places], radius, nsample)
        _write_near(idx[places], near, counts)
    return 1


def voxel_query_wrapper(
    M: int,  # noqa: N803
    R1: int,  # noqa: N803
    R2: int,  # noqa: N803
    R3: int,  # noqa: N803
    nsample: int,
    radius: float,
    z_range: int,
    y_range: int,
    x_range: int,
    new_xyz: Tensor,
    xyz: Tensor,
    new_coords: Tensor,
    point_indices: Tensor,
    idx: Tensor,
) -> int:
    """idx (M, nsample): the first points within the radius, in the order of the voxels round each place.

    new_xyz: (M, 3); new_coords: (M, 4), sample, z, y and x of the voxel of each; point_indices: (B, R1, R2, R3), the
    point of each voxel, -1 for none.   Filled up with the first; idx[:, 0] is -1 where there is none.
    """
    spans = [torch.arange(-reach, reach + 1, device=xyz.device) for reach in (z_range, y_range, x_range)]
    offsets = torch.cartesian_prod(*spans)  # (O, 3), z the slowest
    squared = xyz.new_tensor(radius) ** 2
    table = point_indices.view(-1)
    step = max(1, PAIRS // len(offsets))
    for begin in range(0, len(new_coords), step):
        some = slice(begin, begin + step)
        coords = new_coords[some].long()
        flat = coords[:, :1].expand(-1, len(offsets)).clone()
        within = torch.ones_like(flat, dtype=torch.bool)
        for axis, size in enumerate((R1, R2, R3)):
            at = coords[:, axis + 1, None] + offsets[:, axis]
            within = within & (at >= 0) & (at < size)
            flat = flat * size + at
        found = table[flat.clamp_(0, len(table) - 1)]
        rows, steps = ((found >= 0) & within).nonzero(as_tuple=True)
        columns = found[rows, steps].long()
        near = squared_distances(xyz[columns], new_xyz[some][rows]) <= squared
        rows, columns = rows[near], columns[near]
        ranks = ranks_of_sorted(rows)
        counts = torch.bincount(rows, minlength=len(coords))
        chosen = columns.new_zeros(len(coords), nsample)
        chosen[rows[ranks == 0]] = columns[ranks == 0, None]
        kept = ranks < nsample
        chosen[rows[kept], ranks[kept]] = columns[kept]
        _write_near(idx[some], chosen, counts)
    return 1


def group_points_wrapper(
    B: int,  # noqa: N803
    M: int,  # noqa: N803
    C: int,  # noqa: N803
    nsample: int,
    features: Tensor,
    features_batch_cnt: Tensor,
    idx: Tensor,
    idx_batch_cnt: Tensor,
    out: Tensor,
) -> int:
    """out (M1 + M2 ..., C, nsample): features (N1 + N2 ..., C) of the points idx (M1 + M2 ..., nsample)."""
    rows = _stacked(idx, features_batch_cnt, idx_batch_cnt)
    out.copy_(features[rows].transpose(1, 2))
    return 1


def group_points_grad_wrapper(
    B: int,  # noqa: N803
    M: int,  # noqa: N803
    C: int,  # noqa: N803
    N: int,  # noqa: N803
    nsample: int,
    grad_out: Tensor,
    idx: Tensor,
    idx_batch_cnt: Tensor,
    features_batch_cnt: Tensor,
    grad_features: Tensor,
) -> int:
    """Adds to grad_features (N1 + N2 ..., C) what grad_out (M1 + M2 ..., C, nsample) says of the points idx."""
    rows = _stacked(idx, features_batch_cnt, idx_batch_cnt)
    grad_features.index_add_(0, rows.flatten(), grad_out.transpose(1, 2).flatten(0, 1))
    return 1


def stack_farthest_point_sampling_wrapper(
    points: Tensor, temp: Tensor, xyz_batch_cnt: Tensor, idx: Tensor, num_sampled_points: Tensor
) -> int:
    """idx (K1 + K2 ...): farthest points of each sample, by their row in points (N1 + N2 ..., 3).

    temp: (N1 + N2 ...), m^2 to the nearest chosen one, begins at 1e10; num_sampled_points: (batch_size,) K1, K2 ...
    """
    for rows, chosen in segments(xyz_batch_cnt, num_sampled_points):
        nearest = farthest_points(points[rows], temp[rows], chosen.stop - chosen.start)
        idx[chosen] = (nearest + rows.start).to(idx.dtype)
    return 1


def three_nn_wrapper(
    unknown: Tensor, unknown_batch_cnt: Tensor, known: Tensor, known_batch_cnt: Tensor, dist2: Tensor, idx: Tensor
) -> None:
    """dist2 and idx (N1 + N2 ..., 3): m^2 to and rows of the three of known (M1 + M2 ..., 3) nearest in a sample."""
    for places, points in segments(unknown_batch_cnt, known_batch_cnt):
        squared, nearest = three_nearest(known[points], unknown[places])
        dist2[places], idx[places] = squared, (nearest + points.start).to(idx.dtype)


def three_interpolate_wrapper(features: Tensor, idx: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (N, C): features (M, C) of three points each, idx (N, 3), by weight (N, 3)."""
    out.copy_((features[idx.long()] * weight[:, :, None]).sum(1))


def three_interpolate_grad_wrapper(grad_out: Tensor, idx: Tensor, weight: Tensor, grad_features: Tensor) -> None:
    """Adds to grad_features (M, C) what grad_out (N, C) says of three points each."""
    shares = grad_out[:, None] * weight[:, :, None]  # (N, 3, C)
    grad_features.index_add_(0, idx.flatten().long(), shares.flatten(0, 1))


def _write_near(idx: Tensor, near: Tensor, counts: Tensor) -> None:
    """near (M, nsample) into idx where counts (M,) are above 0; elsewhere -1 in the first place."""
    idx.copy_(torch.where(counts[:, None] > 0, near.to(idx.dtype), idx))
    idx[counts == 0, 0] = -1


def _stacked(idx: Tensor, features_batch_cnt: Tensor, idx_batch_cnt: Tensor) -> Tensor:
    """Numbers within a sample, (M1 + M2 ..., nsample), as rows of the stacked features."""
    begins = begins_of(features_batch_cnt.long()).repeat_interleave(idx_batch_cnt.long())
    return idx.long() + begins[:, None]
