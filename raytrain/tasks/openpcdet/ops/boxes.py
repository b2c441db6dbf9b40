"""Which points lie in which boxes (x, y, z, dx, dy, dz, heading), in metres and radians."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.neighbours import near_pairs


def inside(points: Tensor, boxes: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a box and a point in it: (P,) rows of boxes, (P,) rows of points, (P, 3) in the box's frame.

    points: (N, 3), boxes: (M, 7); margin: metres by which a box is wider and longer, its sides excluded; its bottom
    and top have none and are included. In no order within a box.
    """
    empty = torch.zeros(0, dtype=torch.int64, device=points.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = [(empty, empty, points.new_zeros(0, 3))]
    reach = boxes[:, 3:5].norm(dim=1)
    reach = reach[reach.isfinite()]
    if not len(reach):
        return found[0]
    for rows, columns in near_pairs(points[:, :2], boxes[:, :2], float(reach.amax()) / 2 + 2 * margin):
        box, away = boxes[rows], points[columns] - boxes[rows, :3]
        cos, sin = box[:, 6].cos(), box[:, 6].sin()
        along, across = away[:, 0] * cos + away[:, 1] * sin, away[:, 1] * cos - away[:, 0] * sin
        within = (
            (away[:, 2].abs() <= box[:, 5] / 2)
            & (along.abs() < box[:, 3] / 2 + margin)
            & (across.abs() < box[:, 4] / 2 + margin)
        )
        local = torch.stack([along, across, away[:, 2]], dim=1)
        found.append((rows[within], columns[within], local[within]))
    rows, columns, local = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, columns, local
