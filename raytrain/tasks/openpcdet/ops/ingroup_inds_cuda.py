"""pcdet.ops.ingroup_inds.ingroup_inds_cuda: the place of each voxel within its window."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.tasks.openpcdet.ops.neighbours import ranks_of_sorted


def forward(group_inds: Tensor, out_inds: Tensor) -> None:
    """out_inds (N,): how many of the same group stand before each.   group_inds: (N,) int64.

    In order, so that a run repeats; the kernel gives the places in the order in which its threads arrive.
    """
    groups, order = torch.sort(group_inds, stable=True)
    out_inds[order] = ranks_of_sorted(groups).to(out_inds.dtype)
