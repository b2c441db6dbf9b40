"""pcdet.ops.pointnet2.pointnet2_batch.pointnet2_batch_cuda: PointNet++ on batches of as many points each.

The leading sizes are arguments because the kernels want them; here the tensors tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.neighbours import ball, three_nearest
from raytrain.tasks.openpcdet.ops.sampling import farthest_points


def ball_query_wrapper(
    b: int, n: int, m: int, radius: float, nsample: int, new_xyz: Tensor, xyz: Tensor, idx: Tensor
) -> int:
    """idx (B, M, nsample): the first points nearer than the radius, filled up with the first; untouched where none is.

    new_xyz: (B, M, 3), xyz: (B, N, 3).
    """
    for places, points, chosen in zip(new_xyz, xyz, idx, strict=True):
        near, counts = ball(points, places, radius, nsample)
        chosen.copy_(torch.where(counts[:, None] > 0, near.to(chosen.dtype), chosen))
    return 1


def group_points_wrapper(
    b: int, c: int, n: int, npoints: int, nsample: int, points: Tensor, idx: Tensor, out: Tensor
) -> int:
    """out (B, C, M, nsample): features (B, C, N) of the points idx (B, M, nsample)."""
    return gather_points_wrapper(b, c, n, npoints * nsample, points, idx.flatten(1), out.flatten(2))


def group_points_grad_wrapper(
    b: int, c: int, n: int, npoints: int, nsample: int, grad_out: Tensor, idx: Tensor, grad_points: Tensor
) -> int:
    """Adds to grad_points (B, C, N) what grad_out (B, C, M, nsample) says of the points idx (B, M, nsample)."""
    return gather_points_grad_wrapper(b, c, n, npoints * nsample, grad_out.flatten(2), idx.flatten(1), grad_points)


def gather_points_wrapper(b: int, c: int, n: int, npoints: int, points: Tensor, idx: Tensor, out: Tensor) -> int:
    """out (B, C, M): features (B, C, N) of the points idx (B, M)."""
    out.copy_(points.gather(2, _of_channels(idx, points.shape[1])))
    return 1


def gather_points_grad_wrapper(
    b: int, c: int, n: int, npoints: int, grad_out: Tensor, idx: Tensor, grad_points: Tensor
) -> int:
    """Adds to grad_points (B, C, N) what grad_out (B, C, M) says of the points idx (B, M)."""
    grad_points.scatter_add_(2, _of_channels(idx, grad_out.shape[1]), grad_out)
    return 1


def farthest_point_sampling_wrapper(b: int, n: int, m: int, points: Tensor, temp: Tensor, idx: Tensor) -> int:
    """idx (B, M): farthest points of points (B, N, 3); temp (B, N), m^2 to the nearest chosen one, begins at 1e10."""
    for of_sample, squared, chosen in zip(points, temp, idx, strict=True):
        chosen.copy_(farthest_points(of_sample, squared, m))
    return 1


def three_nn_wrapper(b: int, n: int, m: int, unknown: Tensor, known: Tensor, dist2: Tensor, idx: Tensor) -> None:
    """dist2 and idx (B, N, 3): m^2 to and row numbers of the three of known (B, M, 3) nearest to unknown (B, N, 3)."""
    for sample, (places, points) in enumerate(zip(unknown, known, strict=True)):
        squared, nearest = three_nearest(points, places)
        dist2[sample], idx[sample] = squared, nearest.to(idx.dtype)


def three_interpolate_wrapper(
    b: int, c: int, m: int, n: int, points: Tensor, idx: Tensor, weight: Tensor, out: Tensor
) -> None:
    """out (B, C, N): features (B, C, M) of three points each, idx (B, N, 3), by weight (B, N, 3)."""
    three = points.gather(2, _of_channels(idx.flatten(1), points.shape[1])).unflatten(2, (-1, 3))
    out.copy_((three * weight[:, None]).sum(3))


def three_interpolate_grad_wrapper(
    b: int, c: int, n: int, m: int, grad_out: Tensor, idx: Tensor, weight: Tensor, grad_points: Tensor
) -> None:
    """Adds to grad_points (B, C, M) what grad_out (B, C, N) says of three points each."""
    shares = (grad_out[..., None] * weight[:, None]).flatten(2)
    grad_points.scatter_add_(2, _of_channels(idx.flatten(1), grad_out.shape[1]), shares)


def _of_channels(idx: Tensor, num_channels: int) -> Tensor:
    """(B, M) -> (B, C, M) int64."""
    return idx.long()[:, None].expand(-1, num_channels, -1)
