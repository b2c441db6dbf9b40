"""pcdet.ops.iou3d_nms.iou3d_nms_cuda: overlaps of rotated boxes, and suppression, by PointPillars' own geometry.

Exact, where the kernels count a corner up to 1 cm outside a box as inside: overlaps differ by up to that margin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.pointpillars import geometry


def boxes_overlap_bev_gpu(boxes_a: Tensor, boxes_b: Tensor, ans_overlap: Tensor) -> int:
    """ans_overlap (N, M): m^2 that boxes_a (N, 7) and boxes_b (M, 7) share, seen from above."""
    ans_overlap.copy_(geometry.overlap_bev(boxes_a, boxes_b))
    return 1


def boxes_aligned_overlap_bev_gpu(boxes_a: Tensor, boxes_b: Tensor, ans_overlap: Tensor) -> int:
    """ans_overlap (N, 1): m^2 that the boxes of each pair share, seen from above.   boxes_a, boxes_b: (N, 7)."""
    ans_overlap.copy_(geometry.overlap_paired(boxes_a, boxes_b).view_as(ans_overlap))
    return 1


paired_boxes_overlap_bev_gpu = boxes_aligned_overlap_bev_gpu


def boxes_iou_bev_gpu(boxes_a: Tensor, boxes_b: Tensor, ans_iou: Tensor) -> int:
    """ans_iou (N, M): intersection over union seen from above of boxes_a (N, 7) and boxes_b (M, 7)."""
    ans_iou.copy_(geometry.iou_bev(boxes_a, boxes_b))
    return 1


boxes_iou_bev_cpu = boxes_iou_bev_gpu


def boxes_aligned_iou_bev_cpu(boxes_a: Tensor, boxes_b: Tensor, ans_iou: Tensor) -> int:
    """ans_iou (N, 1): intersection over union of each pair, seen from above.   boxes_a, boxes_b: (N, 7)."""
    ans_iou.copy_(geometry.iou_bev_paired(boxes_a, boxes_b).view_as(ans_iou))
    return 1


def nms_gpu(boxes: Tensor, keep: Tensor, nms_overlap_thresh: float) -> int:
    """How many boxes stay, their row numbers in the first places of `keep`.

    boxes: (N, 7), the best first; keep: (N,) int64, on any device. A box goes where it overlaps a better one that stays
    by more than the threshold, seen from above.
    """
    by_rank = -torch.arange(len(boxes), device=boxes.device)
    stays = geometry.nms(boxes, by_rank, nms_overlap_thresh, pre_max=len(boxes), post_max=len(boxes))
    keep[: len(stays)] = stays.to(keep.device)
    return len(stays)


def nms_normal_gpu(boxes: Tensor, keep: Tensor, nms_overlap_thresh: float) -> int:
    """`nms_gpu` of boxes whose headings count as 0."""
    boxes = boxes.clone()
    boxes[:, 6] = 0
    return nms_gpu(boxes, keep, nms_overlap_thresh)
