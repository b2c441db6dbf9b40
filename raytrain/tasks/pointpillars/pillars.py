"""From points to the bird's-eye map: pillar features (OpenPCDet's PillarVFE) and where they go (PointPillarScatter)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
            PillarLayer(widths[i], widths[i + 1], options.USE_NORM, i == layers[-1], i == layers[0]) for i in layers
        )
        size = torch.tensor(voxel_size, dtype=torch.float32)
        self.register_buffer("voxel_size", size, persistent=False)
        middle = [low + step / 2 for low, step in zip(point_cloud_range[:3], voxel_size, strict=True)]
        self.register_buffer("middle", torch.tensor(middle, dtype=torch.float32), persistent=False)

    def forward(self, voxels: Tensor, num_points: Tensor, coords: Tensor) -> Tensor:
        first = self.pfn_layers[0]
        assert isinstance(first, PillarLayer)
        if voxels.device.type == "cpu" and first.takes_points and not torch.compiler.is_compiling():
            return self._of_points(first, voxels, num_points, coords)
        features = self.decorated(voxels, num_points, coords)
        for layer in self.pfn_layers:
            features = layer(features)
        return features

    def _of_points(self, layer: PillarLayer, voxels: Tensor, num_points: Tensor, coords: Tensor) -> Tensor:
        """By the points that are there, a fifth of all slots. A GPU would have to be waited for to know which."""
        slots = _there(voxels, num_points).flatten().nonzero().squeeze(1)
        pillar = slots // voxels.shape[1]
        points = voxels.flatten(0, 1).index_select(0, slots)
        mean, centre = (each.index_select(0, pillar) for each in self._middles(voxels, num_points, coords))
        rows = self._features(points, mean, centre)
        return layer.of_points(rows, pillar, num_points, voxels.shape[1])

    def decorated(self, voxels: Tensor, num_points: Tensor, coords: Tensor) -> Tensor:
        """Each point with its offsets from its pillar's mean point and centre: (V, P, 10); zeros where no point is."""
        mean, centre = (each[:, None] for each in self._middles(voxels, num_points, coords))
        return self._features(voxels, mean, centre) * _there(voxels, num_points)[..., None].to(voxels.dtype)

    def _middles(self, voxels: Tensor, num_points: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of each pillar's points, and its centre: (V, 3) x y z each."""
        mean = voxels[..., :3].sum(1) / num_points.to(voxels.dtype).clamp(min=1)[:, None]
        return mean, coords[:, 1:].flip(1).to(voxels.dtype) * self.voxel_size + self.middle

    def _features(self, points: Tensor, mean: Tensor, centre: Tensor) -> Tensor:
        """points: (..., 4); mean, centre: (..., 3), of the pillar of each"""
        place = points[..., :3]
        features = [points if self.with_place else points[..., 3:], place - mean, place - centre]
        if self.with_distance:
            features.append(place.norm(dim=-1, keepdim=True))
        return torch.cat(features, dim=-1)


def _there(voxels: Tensor, num_points: Tensor) -> Tensor:
    """(V, P): which slots hold a point."""
    return torch.arange(voxels.shape[1], device=voxels.device) < num_points[:, None]


class PillarLayer(nn.Module):
    """relu(norm(linear(points))), then the maximum over each pillar's points.

    Returns (V, num_out) of the last layer; of others (V, P, num_out), half of which is the maximum, repeated.

    BatchNorm after a linear map is a linear map, and its statistics follow from the mean and covariance of what comes
    in (10 numbers and 10 x 10, however many go out). So the norm is folded into the weights, and after the product what
    is left is the maximum: of (V, P, num_out) numbers one pass where three layers make twelve, forward and backward.
    As in OpenPCDet, slots without a point count in the statistics, as points whose features are 0.
    """

    def __init__(self, num_in: int, num_out: int, use_norm: bool, is_last: bool, is_first: bool = False) -> None:
        super().__init__()
        width = num_out if is_last else num_out // 2
        self.is_first, self.is_last = is_first, is_last
        self.use_norm = use_norm
        self.linear = nn.Linear(num_in, width, bias=not use_norm)
        if use_norm:
            self.norm = nn.BatchNorm1d(width, eps=EPS, momentum=MOMENTUM)

    @property
    def takes_points(self) -> bool:
        """Whether it is the only layer, and can do without the slots that hold no point."""
        return self.is_last and self.is_first and (not self.use_norm or type(self.norm) is nn.BatchNorm1d)

    def of_points(self, points: Tensor, pillar: Tensor, num_points: Tensor, slots: int) -> Tensor:
        """forward() of points (N, F), each in its `pillar` (N,), which has so many slots and holds num_points (V,)."""
        weight, bias = self._weight_and_bias(points, len(num_points) * slots)
        peaks: Tensor = PeaksOfPoints.apply(points, pillar, num_points < slots, weight)
        return (peaks + bias).relu()

    def forward(self, points: Tensor) -> Tensor:
        if self.use_norm and self.training and type(self.norm) is not nn.BatchNorm1d:
            values = self.linear(points)  # SYNC_BN: the statistics are of all processes together
            return self._joined(self.norm(values.flatten(0, 1)).view_as(values).relu())
        weight, bias = self._weight_and_bias(points.flatten(0, 1), points.shape[0] * points.shape[1])
        if self.is_last:
            return (peaks(points, weight) + bias).relu()
        return self._joined((F.linear(points, weight) + bias).relu())

    def _joined(self, values: Tensor) -> Tensor:
        """(V, P, width) -> what the layer returns."""
        if self.is_last:
            return values.max(1).values
        return torch.cat([values, values.max(1, keepdim=True).values.expand_as(values)], dim=-1)

    def _weight_and_bias(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(num_out, num_in) and (num_out,), of linear and norm in one.   rows, count: see _statistics"""
        if not self.use_norm:
            return self.linear.weight, self.linear.bias
        norm, weight = self.norm, self.linear.weight
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
        if self.training and count:
            mean, var = self._statistics(rows, count)
        scale = norm.weight * (var + norm.eps).rsqrt()
        return weight * scale[:, None], norm.bias - mean * scale

    def _statistics(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean and variance (num_out,) of linear(rows), which go into the running ones.

        rows: (N, num_in) of `count` there are; the others are 0
        """
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
        # In f64: squares of metres are a thousand times the variances that remain of them, which f32 leaves 4 digits.
        # And autocast lets f64 be.
        exact, weight = rows.double(), self.linear.weight.double()
        centre = exact.sum(0) / count
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


class PeaksOfPoints(torch.autograd.Function):
    """The largest of points (N, F) @ weight (C, F) over those of each pillar, and 0 where it has room left: (V, C).

    Points that are equally large share the gradient.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, points: Tensor, pillar: Tensor, has_room: Tensor, weight: Tensor) -> Tensor:
        values = points @ weight.T  # (N, C)
        peaks = torch.where(has_room, 0.0, -torch.inf)[:, None].repeat(1, values.shape[1])
        peaks.scatter_reduce_(0, pillar[:, None].expand_as(values), values, "amax")
        is_peak = (values == peaks.index_select(0, pillar)).float()
        ctx.save_for_backward(points, pillar, is_peak)
        return peaks

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:  # type: ignore[override]
        points, pillar, is_peak = ctx.saved_tensors
        count = torch.zeros_like(grad).scatter_add_(0, pillar[:, None].expand_as(is_peak), is_peak)
        shares = (grad / count.clamp_(min=1)).index_select(0, pillar).mul_(is_peak)  # (N, C)
        return None, None, None, shares.T @ points


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
