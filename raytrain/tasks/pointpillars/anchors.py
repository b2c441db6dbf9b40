"""Anchors on the bird's-eye map, boxes as differences from them, and which of them shall answer for which box.

Formulas and order are OpenPCDet's (AnchorGenerator, ResidualCoder, AxisAlignedTargetAssigner), the arithmetic is not:
anchors of one shape stand on a grid, so their overlaps with a box are products of overlaps along x and along y. That is
the same in every bit and takes a twentieth of the arithmetic; and nothing here asks the device what it found.

Flat order of anchors: ((y * nx + x) * K + k), the K kinds at a place by class, then size, then rotation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.tasks.pointpillars.geometry import nearest_bev
from raytrain.tasks.pointpillars.model_options import AnchorClass

MIN_SIZE = 1e-5  # metres; boxes are not encoded as smaller than this (OpenPCDet's)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What each anchor shall say.

    labels: (B, A) int64: 1-based class, 0 for background, -1 where the answer does not count
    codes:  (B, A, 7) float32, the box of anchors with a class relative to the anchor; zeros elsewhere
    """

    labels: Tensor
    codes: Tensor


@dataclasses.dataclass(frozen=True)
class Matching:
    """How one class, a 1-based `label` with its anchors `kinds`, goes by IoU."""

    label: int
    kinds: range
    matched: float
    unmatched: float


class Anchors(nn.Module):
    """The anchors of all classes over a map of (nx, ny) cells.

    Kept as places along x (K, nx) and y (K, ny) and kinds (K, 5: z dx dy dz heading), a few kB: raytrain sends buffers
    from process to process, and all 321,408 anchors of KITTI's grid would be 9 MB a step.
    """

    x: Tensor
    y: Tensor
    kinds: Tensor

    def __init__(
        self,
        classes: Sequence[AnchorClass],
        class_names: Sequence[str],
        map_size: tuple[int, int],
        point_cloud_range: Sequence[float],
    ) -> None:
        super().__init__()
        kinds: list[list[float]] = []
        x: list[Tensor] = []
        y: list[Tensor] = []
        self.matchings = []
        for one in classes:
            bottom, first = one.anchor_bottom_heights[0], len(kinds)
            kinds += [[bottom + size[2] / 2, *size, turn] for size in one.anchor_sizes for turn in one.anchor_rotations]
            for axis, places in ((0, x), (1, y)):
                low, high = point_cloud_range[axis], point_cloud_range[axis + 3]
                places += [_places(low, high, map_size[axis], one.align_center)] * (len(kinds) - first)
            label = list(class_names).index(one.class_name) + 1
            mine = range(first, len(kinds))
            self.matchings.append(Matching(label, mine, one.matched_threshold, one.unmatched_threshold))
        self.register_buffer("x", torch.stack(x), persistent=False)
        self.register_buffer("y", torch.stack(y), persistent=False)
        self.register_buffer("kinds", torch.tensor(kinds, dtype=torch.float32), persistent=False)

    def boxes(self) -> Tensor:
        """All anchors as boxes: (ny, nx, K, 7)."""
        shape = (self.y.shape[1], self.x.shape[1], *self.kinds.shape)
        places = torch.stack([self.x.T.expand(shape[:3]), self.y.T[:, None].expand(shape[:3])], dim=-1)
        return torch.cat([places, self.kinds.expand(shape)], dim=-1)

    @torch.no_grad()
    def assign(self, gt_boxes: Tensor) -> Targets:
        """What each anchor shall say in frames with these boxes.

        gt_boxes: (B, M, 8) x y z dx dy dz heading class; class 0 is padding.
        """
        # One row of padding more: a batch of empty frames may have none, and there is nothing to reduce over then.
        gt_boxes = F.pad(gt_boxes.float(), (0, 0, 0, 1))  # (B, M, 8)
        labels, rows = [], []
        for matching in self.matchings:
            # One class at a time: 0.5 GB for 4 frames of 100 boxes on KITTI's 321,408 anchors
            overlaps = [self._overlaps(kind, gt_boxes, matching.label) for kind in matching.kinds]
            for label, row in _matched(overlaps, matching):
                labels.append(label)
                rows.append(row)
        label = torch.stack(labels, dim=-1).flatten(1)  # (B, A)
        codes = self._codes(gt_boxes[..., :7], torch.stack(rows, dim=-1))
        return Targets(label, torch.where((label > 0)[..., None], codes, 0.0))

    def _codes(self, boxes: Tensor, rows: Tensor) -> Tensor:
        """encode() of the box that each anchor is given: (B, A, 7).

        boxes: (B, M, 7).   rows: (B, ny, nx, K), which of the M.
        Among the anchors of a kind only x and y differ; the rest is worked out once for each box, and looked up.
        """
        at_zero = F.pad(self.kinds, (2, 0))  # (K, 7)
        table = encode(boxes[:, :, None], at_zero)  # (B, M, K, 7)
        table[..., :2] = boxes[:, :, None, :2]
        count = len(self.kinds)
        frames = torch.arange(len(boxes), device=rows.device) * boxes.shape[1]
        numbers = (rows + frames[:, None, None, None]) * count + torch.arange(count, device=rows.device)
        codes = table.view(-1, 7).index_select(0, numbers.flatten()).view(*rows.shape, 7)
        diagonal = _units(self.kinds[:, 1:4])[:, 0]
        codes[..., 0].sub_(self.x.T).div_(diagonal)
        codes[..., 1].sub_(self.y.T[:, None]).div_(diagonal)
        return codes.flatten(1, 3)

    def _overlaps(self, kind: int, gt_boxes: Tensor, label: int) -> Tensor:
        """IoU, turned to the nearest axis, of one kind's anchors with the boxes of `label`; 0 with others.

        Returns (B, M, ny, nx).
        """
        boxes = nearest_bev(gt_boxes[..., :7])[..., None]  # (B, M, 4, 1)
        centred = F.pad(self.kinds[kind], (2, 0))  # at 0, 0
        _, _, half_x, half_y = nearest_bev(centred).unbind()
        left, right = self.x[kind] - half_x, self.x[kind] + half_x  # (nx,)
        low, high = self.y[kind] - half_y, self.y[kind] + half_y  # (ny,)
        along = (torch.minimum(right, boxes[:, :, 2]) - torch.maximum(left, boxes[:, :, 0])).clamp(min=0)
        across = (torch.minimum(high, boxes[:, :, 3]) - torch.maximum(low, boxes[:, :, 1])).clamp(min=0)
        along = along * (gt_boxes[..., 7, None] == label)  # (B, M, nx)
        area = (boxes[:, :, 2] - boxes[:, :, 0]) * (boxes[:, :, 3] - boxes[:, :, 1])  # (B, M, 1)
        shared = across[..., None] * along[:, :, None]  # (B, M, ny, nx)
        joined = ((high - low)[:, None] * (right - left) + area[..., None]).sub_(shared)
        return shared.div_(joined.clamp_(min=1e-6))  # the floor is OpenPCDet's


def _places(low: float, high: float, count: int, centred: bool) -> Tensor:
    """(count,) places along an axis: the middles of its cells, or evenly from its first to its last metre."""
    if centred or count == 1:
        step = (high - low) / count
        return (torch.arange(count, dtype=torch.float64) * step + low + step / 2).float()
    return (torch.arange(count, dtype=torch.float64) * ((high - low) / (count - 1)) + low).float()


def _matched(overlaps: Sequence[Tensor], matching: Matching) -> list[tuple[Tensor, Tensor]]:
    """For each kind of a class: labels (B, ny, nx), and the row of the box that the anchor overlaps most.

    overlaps: for each kind (B, M, ny, nx)
    """
    best_of_box = torch.stack([overlap.amax((2, 3)) for overlap in overlaps]).amax(0)  # (B, M)
    best_of_box = torch.where(best_of_box == 0, -1.0, best_of_box)[..., None, None]  # no anchor is at -1
    found = []
    for overlap in overlaps:
        best, row = overlap.max(dim=1)  # (B, ny, nx)
        forced = (overlap == best_of_box).any(dim=1)
        label = torch.where(best >= matching.matched, matching.label, -1)
        label = torch.where(best < matching.unmatched, 0, label)
        found.append((torch.where(forced, matching.label, label), row))
    return found


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes as differences from anchors, (..., 7) each: x, y in diagonals, z in heights, sizes as logarithms."""
    size, anchor_size = boxes[..., 3:6].clamp(min=MIN_SIZE), anchors[..., 3:6].clamp(min=MIN_SIZE)
    unit = _units(anchor_size)
    heading = boxes[..., 6:] - anchors[..., 6:]
    return torch.cat([(boxes[..., :3] - anchors[..., :3]) / unit, (size / anchor_size).log(), heading], dim=-1)


def decode(codes: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of encode: codes (..., 7) and anchors (..., 7) give boxes (..., 7)."""
    size = anchors[..., 3:6]
    place = codes[..., :3] * _units(size) + anchors[..., :3]
    return torch.cat([place, codes[..., 3:6].exp() * size, codes[..., 6:] + anchors[..., 6:]], dim=-1)


def _units(size: Tensor) -> Tensor:
    """(..., 3) sizes -> (..., 3): what offsets along x, y and z are measured in."""
    diagonal = size[..., :2].square().sum(-1, keepdim=True).sqrt()
    return torch.cat([diagonal, diagonal, size[..., 2:]], dim=-1)
