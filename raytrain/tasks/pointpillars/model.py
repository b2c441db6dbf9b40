"""PointPillars (Lang et al., CVPR 2019) as OpenPCDet's `PointPillar`: its parameters, its numbers, plain torch.

A state_dict of either loads strictly into the other. What is computed otherwise, as that is faster: PillarLayer, Head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.tasks.pointpillars.anchors import Anchors, decode
from raytrain.tasks.pointpillars.geometry import limit_period, nms
from raytrain.tasks.pointpillars.losses import box_loss, class_loss, direction_loss
from raytrain.tasks.pointpillars.model_options import Backbone2d, DenseHead, read_model_options
from raytrain.tasks.pointpillars.pillars import EPS, MOMENTUM, PillarFeatures, scattered

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
        # Only if OPTIMIZATION.CHANNELS_LAST says so: a fifth faster, but the CPU's BatchNorm sums a digit less exactly.
        channels_last = not next(self.backbone_2d.parameters()).is_contiguous()
        bev = scattered(pillars, batch["voxel_coords"], num_frames, self.grid_size, channels_last)
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
            directions = self._by_anchor(outputs, "dir_cls_preds")
            turned = direction_loss(directions, targets, self.anchors.kinds[:, 4], head.DIR_OFFSET)
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
        """All convolutions as one product, which gives the channels last as they are read: half the time of three."""
        convs = {"cls_preds": self.conv_cls, "box_preds": self.conv_box}
        if self.conv_dir_cls is not None:
            convs["dir_cls_preds"] = self.conv_dir_cls
        weight = torch.cat([conv.weight.flatten(1) for conv in convs.values()])  # (N, C)
        bias = torch.cat([conv.bias for conv in convs.values() if conv.bias is not None])
        rows = features.flatten(2).transpose(1, 2)  # (B, ny * nx, C)
        said = torch.baddbmm(bias, rows, weight.T.expand(len(rows), -1, -1))
        said = said.view(len(rows), *features.shape[2:], -1)  # (B, ny, nx, N)
        return dict(zip(convs, said.split([conv.out_channels for conv in convs.values()], dim=-1), strict=True))
