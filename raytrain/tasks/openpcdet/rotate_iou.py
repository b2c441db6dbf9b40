"""pcdet's overlaps of rotated rectangles for its evaluations, which numba compiles for CUDA alone; here on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from raytrain.tasks.pointpillars import geometry

IOU, OF_QUERY, OF_BOX = -1, 0, 1  # of criterion; any other gives the area


def rotate_iou_gpu_eval(
    boxes: NDArray[np.floating], query_boxes: NDArray[np.floating], criterion: int = -1, device_id: int = 0
) -> NDArray[np.floating]:
    """(N, K), as boxes are: what boxes (N, 5) and query_boxes (K, 5), x y dx dy heading, share.

    criterion: -1 of their union, 0 of the query box's area, 1 of the box's, as the kernel has it; 2 the area, m^2.
    Their heading is clockwise.
    """
    flat = [_flat(each) for each in (boxes, query_boxes)]
    if criterion == IOU:
        return geometry.iou_bev(*flat).numpy().astype(boxes.dtype)
    shared = geometry.overlap_bev(*flat)
    of_box, of_query = (each[:, 3] * each[:, 4] for each in flat)
    if criterion == OF_QUERY:
        shared = shared / of_query.clamp(min=1e-12)
    elif criterion == OF_BOX:
        shared = shared / of_box[:, None].clamp(min=1e-12)
    return shared.numpy().astype(boxes.dtype)


def _flat(boxes: NDArray[np.floating]) -> torch.Tensor:
    x, y, dx, dy, heading = torch.from_numpy(np.asarray(boxes, dtype=np.float64)).reshape(-1, 5).unbind(1)
    return torch.stack([x, y, torch.zeros_like(x), dx, dy, torch.ones_like(x), -heading], dim=1)
