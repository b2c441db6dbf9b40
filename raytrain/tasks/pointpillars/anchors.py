"""Anchors on the bird's-eye map, boxes as differences from them, and which of them shall answer for which box.

Formulas and order are OpenPCDet's (AnchorGenerator, ResidualCoder, AxisAlignedTargetAssigner), the arithmetic is not:
anchors of one shape stand on a grid, so their overlaps with a box are products of overlaps along x and along y. That is
the same in every bit and takes a twentieth of the arithmetic. On a CPU only boxes and anchors that count are gone
through; a GPU is not asked which they are, since that would wait for it.

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

    labels:  (B, A) int64: 1-based class, 0 for background, -1 where the answer does not count
    anchors: (N,) int64, those with a class, of all B * A; on a GPU all
    kinds:   (N,) int64, which of the K each of them is
    codes:   (N, 7) float32, their boxes relative to them
    """

    labels: Tensor
    anchors: Tensor
    kinds: Tensor
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
        labels, anchors, kinds, codes = [], [], [], []
        for matching in self.matchings:
            # One class at a time: 0.5 GB for 4 frames of 100 boxes on KITTI's 321,408 anchors
            boxes = _of_class(gt_boxes, matching.label)
            overlaps = [self._overlaps(kind, boxes, matching.label) for kind in matching.kinds]
            for kind, overlap, label in zip(matching.kinds, overlaps, _matched(overlaps, matching), strict=True):
                places = _true(label > 0)
                labels.append(label)
                anchors.append(places * len(self.kinds) + kind)
                kinds.append(torch.full_like(places, kind))
                codes.append(self._codes(kind, places, overlap, boxes))
        label = torch.stack(labels, dim=-1).flatten(1)  # (B, A)
        return Targets(label, torch.cat(anchors), torch.cat(kinds), torch.cat(codes))

    def _codes(self, kind: int, places: Tensor, overlap: Tensor, boxes: Tensor) -> Tensor:
        """encode() of the box that each of these anchors overlaps most: (n, 7).

        places: (n,), of all B * ny * nx.   overlap: (B, M, ny, nx).   boxes: (B, M, 8).
        """
        overlap = overlap.flatten(2)  # (B, M, ny * nx)
        frame, place = places // overlap.shape[2], places % overlap.shape[2]
        row = overlap[frame, :, place].argmax(1)
        nx = self.x.shape[1]
        at = torch.stack([self.x[kind, place % nx], self.y[kind, place // nx]], dim=-1)
        anchors = torch.cat([at, self.kinds[kind].expand(len(at), 5)], dim=-1)
        return encode(boxes[frame, row, :7], anchors)

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


def _of_class(gt_boxes: Tensor, label: int) -> Tensor:
    """(B, M, 8) boxes with those of a class first, in their order; on a CPU without most of the others."""
    is_of_class = gt_boxes[..., 7] == label
    most = gt_boxes.shape[1] if _would_wait(gt_boxes) else max(1, int(is_of_class.sum(1).max()))
    rows = is_of_class.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return gt_boxes.gather(1, rows[..., None].expand(-1, -1, gt_boxes.shape[2]))


def _matched(overlaps: Sequence[Tensor], matching: Matching) -> list[Tensor]:
    """For each kind of a class: labels (B, ny, nx).

    overlaps: for each kind (B, M, ny, nx)
    """
    best_of_box = torch.stack([overlap.amax((2, 3)) for overlap in overlaps]).amax(0)  # (B, M)
    best_of_box = torch.where(best_of_box == 0, -1.0, best_of_box)[..., None, None]  # no anchor is at -1
    found = []
    for overlap in overlaps:
        best = overlap.amax(1)  # (B, ny, nx)
        forced = (overlap == best_of_box).any(dim=1)
        label = torch.where(best >= matching.matched, matching.label, -1)
        label = torch.where(best < matching.unmatched, 0, label)
        found.append(torch.where(forced, matching.label, label))
    return found


def _true(mask: Tensor) -> Tensor:
    """The flat numbers of what is true; on a GPU of all."""
    flat = mask.flatten()
    return torch.arange(len(flat), device=flat.device) if _would_wait(flat) else flat.nonzero().squeeze(1)


def _would_wait(tensor: Tensor) -> bool:
    """Whether the host would wait for the device to learn a size that depends on what is in a tensor."""
    return tensor.device.type != "cpu"


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
