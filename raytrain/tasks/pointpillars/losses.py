"""What an anchor head's answers cost, by OpenPCDet's formulas.

Anchors that do not count weigh 0. Of boxes and directions only those with a class are computed, as Targets names them;
no value leaves a GPU for that.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrain.tasks.pointpillars.anchors import Targets
from raytrain.tasks.pointpillars.geometry import limit_period

ALPHA = 0.25  # of the focal loss (Lin et al., ICCV 2017), whose exponent is 2
BETA = 1 / 9  # where the smooth L1 loss turns linear


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss, summed over anchors and classes, divided by each frame's positives; the mean over frames.

    logits: (B, A, C).   labels: (B, A) as Targets has them.
    """
    classes = torch.arange(1, logits.shape[-1] + 1, device=labels.device)
    wanted = labels[..., None] == classes  # (B, A, C)
    # With the sign turned where the class is wanted, both halves of the formula are one: the larger, the worse.
    wrong = torch.where(wanted, -logits, logits)
    loss = wrong.sigmoid().square() * F.softplus(wrong) * torch.where(wanted, ALPHA, 1 - ALPHA)
    return (loss.sum(-1) * _shares(labels, labels >= 0)).sum() / len(labels)


def box_loss(codes: Tensor, targets: Targets, code_weights: Tensor) -> Tensor:
    """Smooth L1 loss of the positives' boxes, the headings by the sine of their difference; weighed as class_loss.

    codes: (B, A, 7).   code_weights: (7,).
    """
    difference = codes.flatten(0, 1).index_select(0, targets.anchors) - targets.codes  # (N, 7)
    # sin(a)cos(b) - cos(a)sin(b): a box turned by half a turn costs nothing here, the direction's loss tells them apart
    difference = torch.cat([difference[..., :6], difference[..., 6:].sin()], dim=-1) * code_weights
    loss = F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=BETA, reduction="none")
    return (loss.sum(-1) * _shares_of_positives(targets)).sum() / len(codes)


def direction_loss(logits: Tensor, targets: Targets, headings: Tensor, offset: float) -> Tensor:
    """Cross-entropy of the positives' direction bins; weighed as class_loss.

    logits: (B, A, bins).   headings: (K,) radians, by kind of anchor.   offset: where the first bin begins, radians.
    """
    num_bins = logits.shape[-1]
    turned = limit_period(targets.codes[:, 6] + headings[targets.kinds] - offset, 0, 2 * math.pi)
    bins = (turned / (2 * math.pi / num_bins)).floor().long().clamp(0, num_bins - 1)  # (N,)
    of_anchors = logits.flatten(0, 1).index_select(0, targets.anchors)
    loss = F.cross_entropy(of_anchors, bins, reduction="none")
    return (loss * _shares_of_positives(targets)).sum() / len(logits)


def _shares_of_positives(targets: Targets) -> Tensor:
    """(N,): _shares() of those that Targets names."""
    shares = _shares(targets.labels, targets.labels > 0)
    return shares.flatten().index_select(0, targets.anchors)


def _shares(labels: Tensor, counted: Tensor) -> Tensor:
    """(B, A): 1 / (the frame's positives, at least 1) where counted, else 0."""
    return counted.float() / (labels > 0).sum(1, keepdim=True).clamp(min=1)
