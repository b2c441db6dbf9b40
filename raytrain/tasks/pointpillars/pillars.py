"""From points to the bird's-eye map: pillar features (OpenPCDet's PillarVFE) and where they go (PointPillarScatter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.tasks.pointpillars.model_options import Vfe

EPS, MOMENTUM = 1e-3, 0.01  # of every BatchNorm


class PillarFeatures(nn.Module):
    """Points (V, P, 4) of V pillars -> (V, C) features."""

    voxel_size: Tensor
    middle: Tensor

    def __init__(self, options: Vfe, point_cloud_range: Sequence[float], voxel_size: Sequence[float]) -> None:
        super().__init__()
        self.with_distance, self.with_place = options.WITH_DISTANCE, options.USE_ABSLOTE_XYZ
        widths = [(10 if self.with_place else 7) + self.with_distance, *options.NUM_FILTERS]
        layers = range(len(options.NUM_FILTERS))
        self.pfn_layers = nn.ModuleList(
            PillarLayer(widths[i], widths[i + 1], options.USE_NORM, is_last=i == layers[-1]) for i in layers
        )
        size = torch.tensor(voxel_size, dtype=torch.float32)
        self.register_buffer("voxel_size", size, persistent=False)
        middle = [low + step / 2 for low, step in zip(point_cloud_range[:3], voxel_size, strict=True)]
        self.register_buffer("middle", torch.tensor(middle, dtype=torch.float32), persistent=False)

    def forward(self, voxels: Tensor, num_points: Tensor, coords: Tensor) -> Tensor:
        features = self.decorated(voxels, num_points, coords)
        for layer in self.pfn_layers:
            features = layer(features)
        return features

    def decorated(self, voxels: Tensor, num_points: Tensor, coords: Tensor) -> Tensor:
        """Each point with its offsets from its pillar's mean point and centre: (V, P, 10); zeros where no point is."""
        place = voxels[..., :3]
        mean = place.sum(1, keepdim=True) / num_points.to(voxels.dtype).clamp(min=1).view(-1, 1, 1)
        centre = coords[:, 1:].flip(1).to(voxels.dtype) * self.voxel_size + self.middle  # (V, 3) x y z
        features = [voxels if self.with_place else voxels[..., 3:], place - mean, place - centre[:, None]]
        if self.with_distance:
            features.append(place.norm(dim=-1, keepdim=True))
        there = torch.arange(voxels.shape[1], device=voxels.device) < num_points[:, None]  # (V, P)
        return torch.cat(features, dim=-1) * there[..., None].to(voxels.dtype)


class PillarLayer(nn.Module):
    """relu(norm(linear(points))), then the maximum over each pillar's points.

    Returns (V, num_out) of the last layer; of others (V, P, num_out), half of which is the maximum, repeated.

    BatchNorm after a linear map is a linear map, and its statistics follow from the mean and covariance of what comes
    in (10 numbers and 10 x 10, however many go out). So the norm is folded into the weights, and after the product what
    is left is the maximum: of (V, P, num_out) numbers one pass where three layers make twelve, forward and backward.
    As in OpenPCDet, slots without a point count in the statistics.
    """

    def __init__(self, num_in: int, num_out: int, use_norm: bool, is_last: bool) -> None:
        super().__init__()
        width = num_out if is_last else num_out // 2
        self.is_last = is_last
        self.use_norm = use_norm
        self.linear = nn.Linear(num_in, width, bias=not use_norm)
        if use_norm:
            self.norm = nn.BatchNorm1d(width, eps=EPS, momentum=MOMENTUM)

    def forward(self, points: Tensor) -> Tensor:
        if self.use_norm and self.training and type(self.norm) is not nn.BatchNorm1d:
            values = self.linear(points)  # SYNC_BN: the statistics are of all processes together
            return self._joined(self.norm(values.flatten(0, 1)).view_as(values).relu())
        weight, bias = self._folded(points) if self.use_norm else (self.linear.weight, self.linear.bias)
        if self.is_last:
            return (peaks(points, weight) + bias).relu()
        return self._joined((F.linear(points, weight) + bias).relu())

    def _joined(self, values: Tensor) -> Tensor:
        """(V, P, width) -> what the layer returns."""
        if self.is_last:
            return values.max(1).values
        return torch.cat([values, values.max(1, keepdim=True).values.expand_as(values)], dim=-1)

    def _folded(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (num_out, num_in) and bias (num_out,) of linear and norm in one."""
        norm, weight = self.norm, self.linear.weight
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
        if self.training and points.numel():
            mean, var = self._statistics(points.flatten(0, 1))
        scale = norm.weight * (var + norm.eps).rsqrt()
        return weight * scale[:, None], norm.bias - mean * scale

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (num_out,) of linear(rows), which go into the running ones.   rows: (N, num_in)."""
        norm, count = self.norm, len(rows)
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        # In f64: squares of metres are a thousand times the variances that remain of them, which f32 leaves 4 digits.
        # And autocast lets f64 be.
        exact, weight = rows.double(), self.linear.weight.double()
        centre = exact.mean(0)
        covariance = exact.T @ exact / count - centre.outer(centre)
        mean, var = (weight @ centre).float(), (weight @ covariance * weight).sum(1).float()
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, MOMENTUM)
            norm.running_var.lerp_(var * (count / max(count - 1, 1)), MOMENTUM)
        return mean, var


def peaks(points: Tensor, weight: Tensor) -> Tensor:
    """The largest of points (V, P, F) @ weight (C, F) over each pillar's points: (V, C).

    The gradient of the weight asks only for the points that are largest, so only they are multiplied in its sight:
    12,000 pillars of 16 points and 32 features take 37 ms there and back, with the maximum's own gradient 100.
    """
    if not torch.is_grad_enabled():
        return F.linear(points, weight).amax(1)
    if points.requires_grad:  # here the looked-up rows would add up their gradients in an order that varies on GPUs
        return F.linear(points, weight).max(1).values
    with torch.no_grad():
        rows = F.linear(points, weight).max(1).indices  # (V, C)
        rows += torch.arange(len(points), device=rows.device)[:, None] * points.shape[1]
    largest = points.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, points.shape[2])  # (V, C, F)
    return (largest * weight).sum(-1)


def scattered(
    pillars: Tensor, coords: Tensor, num_frames: int, grid_size: tuple[int, int], channels_last: bool = False
) -> Tensor:
    """Pillars (V, C) laid out as (B, C, ny, nx), zeros where there is none.

    coords: (V, 4) frame z y x, no two alike: so the order of writing does not matter
    """
    (nx, ny), width = grid_size, pillars.shape[1]
    frame, _, y, x = coords.long().unbind(1)
    if channels_last:
        canvas = pillars.new_zeros(num_frames * ny * nx, width)
        canvas.index_copy_(0, (frame * ny + y) * nx + x, pillars)
        return canvas.view(num_frames, ny, nx, width).permute(0, 3, 1, 2)
    # Number by number: a whole map turned afterwards takes four times as long.
    channel = torch.arange(width, device=coords.device) * (ny * nx)
    places = (frame * width * ny * nx + y * nx + x)[:, None] + channel  # (V, C)
    canvas = pillars.new_zeros(num_frames * width * ny * nx)
    return canvas.index_copy_(0, places.flatten(), pillars.flatten()).view(num_frames, width, ny, nx)
