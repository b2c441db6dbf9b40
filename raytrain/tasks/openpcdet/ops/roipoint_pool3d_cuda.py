"""pcdet.ops.roipoint_pool3d.roipoint_pool3d_cuda: the points in each box, as many of each."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.boxes import inside
from raytrain.tasks.openpcdet.ops.neighbours import firsts

MARGIN = 1e-5  # metres


def forward(
    xyz: Tensor, boxes3d: Tensor, pts_feature: Tensor, pooled_features: Tensor, pooled_empty_flag: Tensor
) -> int:
    """The first S points in each box, repeated in turn where there are fewer; nothing written where there are none.

    xyz: (B, N, 3), boxes3d: (B, M, 7), pts_feature: (B, N, C).   Written: pooled_features (B, M, S, 3 + C), coordinates
    and features; pooled_empty_flag (B, M), 1 for boxes without a point.
    """
    num_sampled = pooled_features.shape[2]
    for sample, (points, boxes) in enumerate(zip(xyz, boxes3d, strict=True)):
        rows, columns, _ = inside(points, boxes, MARGIN)
        rows, columns, ranks = firsts(rows, columns, max(1, len(points)), num_sampled)
        counts = torch.bincount(rows, minlength=len(boxes))
        chosen = columns.new_zeros(len(boxes), num_sampled)
        chosen[rows, ranks] = columns
        turn = torch.arange(num_sampled, device=xyz.device) % counts.clamp(min=1)[:, None]  # (M, S)
        filled = counts.nonzero().squeeze(1)
        chosen = chosen.gather(1, turn)[filled]
        pooled_features[sample, filled] = torch.cat([points[chosen], pts_feature[sample, chosen]], dim=-1)
        pooled_empty_flag[sample, counts == 0] = 1
    return 1
