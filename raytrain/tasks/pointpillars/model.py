"""PointPillars (Lang et al., CVPR 2019) as OpenPCDet's `PointPillar`: its parameters, its numbers, plain torch.

A state_dict of either loads strictly into the other. The way there differs where that is faster: see PillarLayer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.tasks.pointpillars.anchors import Anchors, decode
from raytrain.tasks.pointpillars.geometry import limit_period, nms
from raytrain.tasks.pointpillars.losses import box_loss, class_loss, direction_loss
from raytrain.tasks.pointpillars.model_options import Backbone2d, DenseHead, Vfe, read_model_options

EPS, MOMENTUM = 1e-3, 0.01  # of every BatchNorm
PRIOR = 0.01  # the score of every anchor before training
MAX_LOG_SIZE = 10.0  # decoded boxes are at most e^10 anchors large: infinite ones would make NaN overlaps


class PointPillar(nn.Module):
    """LiDAR sweeps as pillars -> class, box and direction of each anchor.

    cfg:               the MODEL section
    point_cloud_range: x y z from, x y z to, metres, lidar frame
    voxel_size:        x y z, metres
    """

    global_step: Tensor
    code_weights: Tensor

    def __init__(
        self,
        cfg: Mapping[str, Any],
        class_names: Sequence[str],
        point_cloud_range: Sequence[float],
        voxel_size: Sequence[float],
    ) -> None:
        super().__init__()
        low, high = point_cloud_range[:3], point_cloud_range[3:]
        grid = [round((top - bottom) / size) for bottom, top, size in zip(low, high, voxel_size, strict=True)]
        self.options, map_size = read_model_options(cfg, class_names, grid)
        self.grid_size = (grid[0], grid[1])
        self.num_classes = len(class_names)
        head, code_weights = self.options.DENSE_HEAD, self.options.DENSE_HEAD.LOSS_CONFIG.LOSS_WEIGHTS.code_weights
        self.register_buffer("global_step", torch.zeros(1, dtype=torch.int64))  # training forwards
        self.register_buffer("code_weights", torch.tensor(code_weights), persistent=False)
        self.vfe = PillarFeatures(self.options.VFE, point_cloud_range, voxel_size)
        self.backbone_2d = Backbone(self.options.BACKBONE_2D, self.options.MAP_TO_BEV.NUM_BEV_FEATURES)
        self.anchors = Anchors(head.ANCHOR_GENERATOR_CONFIG, class_names, map_size, point_cloud_range)
        num_in = sum(self.options.BACKBONE_2D.NUM_UPSAMPLE_FILTERS)
        self.dense_head = Head(head, num_in, len(self.anchors.kinds), self.num_classes)

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """cls_preds, box_preds and dir_cls_preds, each (B, ny, nx, channels), channels by kind of anchor.

        batch: voxels (V, P, 4) x y z intensity, zeros where there is no point; voxel_coords (V, 4) frame z y x;
        voxel_num_points (V,); gt_boxes (B, M, 8), or batch_size, a plain number.
        """
        if self.training:
            self.global_step += 1
        num_frames = len(batch["gt_boxes"]) if "gt_boxes" in batch else int(batch["batch_size"])
        pillars = self.vfe(batch["voxels"], batch["voxel_num_points"], batch["voxel_coords"])
        bev = scattered(pillars, batch["voxel_coords"], num_frames, self.grid_size)
        outputs: dict[str, Tensor] = self.dense_head(self.backbone_2d(bev))
        return outputs

    def loss(self, outputs: Mapping[str, Tensor], gt_boxes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, float32 under autocast too, and its parts by OpenPCDet's names.

        gt_boxes: (B, M, 8) x y z dx dy dz heading class, the class 1-based; rows of zeros are padding
        """
        head = self.options.DENSE_HEAD
        weights = head.LOSS_CONFIG.LOSS_WEIGHTS
        targets = self.anchors.assign(gt_boxes)
        scores, codes = (self._by_anchor(outputs, name) for name in ("cls_preds", "box_preds"))
        parts = {
            "rpn_loss_cls": class_loss(scores, targets.labels) * weights.cls_weight,
            "rpn_loss_loc": box_loss(codes, targets, self.code_weights) * weights.loc_weight,
        }
        if head.USE_DIRECTION_CLASSIFIER:
            headings = self.anchors.kinds[:, 4].repeat(targets.labels.shape[1] // len(self.anchors.kinds))
            directions = self._by_anchor(outputs, "dir_cls_preds")
            turned = direction_loss(directions, targets, headings, head.DIR_OFFSET)
            parts["rpn_loss_dir"] = turned * weights.dir_weight
        loss = torch.stack(list(parts.values())).sum()
        tb_dict = {"loss_rpn": loss, **parts, "rpn_loss": loss}
        return loss, {name: value.detach() for name, value in tb_dict.items()}

    @torch.no_grad()
    def predictions(self, outputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """What each frame's answers mean: boxes (K, 7), scores (K,), labels (K,) 1-based, the surest first."""
        post = self.options.POST_PROCESSING
        limits = post.NMS_CONFIG
        logits, labels = self._by_anchor(outputs, "cls_preds").max(-1)  # (B, A)
        logits, chosen = logits.topk(min(limits.NMS_PRE_MAXSIZE, logits.shape[1]))  # (B, N)
        labels, boxes = labels.gather(1, chosen) + 1, self.decoded(outputs, chosen)
        scores = logits.sigmoid()
        shown = logits if post.OUTPUT_RAW_SCORE else scores
        found = []
        for frame, sure in enumerate(scores >= post.SCORE_THRESH):
            frame_boxes, frame_scores = boxes[frame][sure], scores[frame][sure]
            kept = nms(frame_boxes, frame_scores, limits.NMS_THRESH, limits.NMS_PRE_MAXSIZE, limits.NMS_POST_MAXSIZE)
            of_frame = {"scores": shown[frame][sure], "labels": labels[frame][sure]}
            found.append({"boxes": frame_boxes[kept], **{name: value[kept] for name, value in of_frame.items()}})
        return found

    def decoded(self, outputs: Mapping[str, Tensor], chosen: Tensor) -> Tensor:
        """The boxes (B, N, 7) of the anchors with these flat numbers (B, N).

        The box's own heading tells which way it lies, the direction's bin which end is the front.
        """
        head = self.options.DENSE_HEAD
        rows = chosen[..., None]
        codes = self._by_anchor(outputs, "box_preds").gather(1, rows.expand(-1, -1, 7))
        codes = torch.cat([codes[..., :3], codes[..., 3:6].clamp(max=MAX_LOG_SIZE), codes[..., 6:]], dim=-1)
        boxes = decode(codes, self.anchors.boxes().flatten(0, 2)[chosen])
        if head.USE_DIRECTION_CLASSIFIER:
            bins = self._by_anchor(outputs, "dir_cls_preds").argmax(-1).gather(1, chosen)
            period = 2 * math.pi / head.NUM_DIR_BINS
            heading = limit_period(boxes[..., 6] - head.DIR_OFFSET, head.DIR_LIMIT_OFFSET, period)
            boxes[..., 6] = heading + head.DIR_OFFSET + period * bins
        return boxes

    def _by_anchor(self, outputs: Mapping[str, Tensor], name: str) -> Tensor:
        """(B, ny, nx, K * n) -> (B, A, n), float32."""
        output = outputs[name].float()
        return output.reshape(len(output), -1, output.shape[-1] // len(self.anchors.kinds))


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
        mean = place.sum(1, keepdim=True) / num_points.to(voxels.dtype).view(-1, 1, 1)
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
    in (10 numbers and 100, whatever num_out is). So the norm is folded into the weights, and after the product all that
    remains is the maximum: of (V, P, num_out) numbers one pass where three layers make twelve, forward and backward.
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
            return (_peaks(points, weight) + bias).relu()
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


def _peaks(points: Tensor, weight: Tensor) -> Tensor:
    """The largest of points (V, P, F) @ weight (C, F) over each pillar's points: (V, C).

    The gradient of the weight asks only for the points that are largest, so only they are multiplied in its sight:
    4,000 pillars of 16 points and 32 features take 30 ms, with the maximum's own gradient 80 (one CPU core).
    """
    if not torch.is_grad_enabled():
        return F.linear(points, weight).amax(1)
    if points.requires_grad:  # here the looked-up rows would add up their gradients in an order that varies on GPUs
        return F.linear(points, weight).max(1).values
    with torch.no_grad():
        rows = F.linear(points, weight).max(1).indices  # (V, C)
        rows += torch.arange(len(points), device=rows.device)[:, None] * points.shape[1]
    largest = points.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)  # (V, C, F)
    return (largest * weight).sum(-1)


def scattered(pillars: Tensor, coords: Tensor, num_frames: int, grid_size: tuple[int, int]) -> Tensor:
    """Pillars (V, C) laid out as (B, C, ny, nx), channels_last in memory, zeros where there is none.

    coords: (V, 4) frame z y x, no two alike: so the order of writing does not matter
    """
    nx, ny = grid_size
    frame, _, y, x = coords.long().unbind(1)
    canvas = pillars.new_zeros(num_frames * ny * nx, pillars.shape[1])
    canvas = canvas.index_copy(0, (frame * ny + y) * nx + x, pillars)
    return canvas.view(num_frames, ny, nx, -1).permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """(B, C, ny, nx) -> all blocks' maps at one resolution, joined: (B, sum of NUM_UPSAMPLE_FILTERS, ny', nx')."""

    def __init__(self, options: Backbone2d, num_in: int) -> None:
        super().__init__()
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        ups = zip(options.UPSAMPLE_STRIDES, options.NUM_UPSAMPLE_FILTERS, strict=True)
        for depth, stride, width, (up, up_width) in zip(
            options.LAYER_NUMS, options.LAYER_STRIDES, options.NUM_FILTERS, ups, strict=True
        ):
            # OpenPCDet has a layer for the padding first, which convolutions do themselves at no cost.
            block: list[nn.Module] = [nn.Identity(), *convolution(num_in, width, stride)]
            for _ in range(depth):
                block += convolution(width, width, 1)
            self.blocks.append(nn.Sequential(*block))
            back: nn.Module
            if up >= 1:
                back = nn.ConvTranspose2d(width, up_width, round(up), round(up), bias=False)
            else:
                back = nn.Conv2d(width, up_width, round(1 / up), round(1 / up), bias=False)
            self.deblocks.append(nn.Sequential(back, *normed(up_width)))
            num_in = width

    def forward(self, bev: Tensor) -> Tensor:
        # Unless OPTIMIZATION.CHANNELS_LAST asks for it: on the CPU torch's BatchNorm then sums a digit less exactly.
        if next(self.parameters()).is_contiguous():
            bev = bev.contiguous()
        maps = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            bev = block(bev)
            maps.append(deblock(bev))
        return torch.cat(maps, dim=1)


def convolution(num_in: int, num_out: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False), *normed(num_out)]


def normed(width: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(width, eps=EPS, momentum=MOMENTUM), nn.ReLU(inplace=True)]


class Head(nn.Module):
    """(B, C, ny, nx) -> what is said of the num_kinds anchors at each place, (B, ny, nx, num_kinds * n) each."""

    def __init__(self, options: DenseHead, num_in: int, num_kinds: int, num_classes: int) -> None:
        super().__init__()
        self.conv_cls = nn.Conv2d(num_in, num_kinds * num_classes, 1)
        self.conv_box = nn.Conv2d(num_in, num_kinds * 7, 1)
        self.conv_dir_cls = None
        if options.USE_DIRECTION_CLASSIFIER:
            self.conv_dir_cls = nn.Conv2d(num_in, num_kinds * options.NUM_DIR_BINS, 1)
        assert self.conv_cls.bias is not None
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - PRIOR) / PRIOR))
        nn.init.normal_(self.conv_box.weight, mean=0, std=0.001)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        outputs = {"cls_preds": self.conv_cls(features), "box_preds": self.conv_box(features)}
        if self.conv_dir_cls is not None:
            outputs["dir_cls_preds"] = self.conv_dir_cls(features)
        return {name: output.permute(0, 2, 3, 1) for name, output in outputs.items()}
