"""Frames of a source as the samples and batches that PointPillars trains on: OpenPCDet's steps in its order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from raytrain.tasks.pointpillars.data_options import DataOptions, Mask
from raytrain.tasks.pointpillars.frames import Annotations, Calibration, Frame, Source, corners, wrapped
from raytrain.tasks.pointpillars.voxels import Voxels

Objects = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.str_]]  # points (N, 4), boxes (M, 7), names (M,)


class Augmentation(Protocol):
    def __call__(self, points: NDArray[np.float32], boxes: NDArray[np.float64], names: NDArray[np.str_]) -> Objects: ...

    def without(self, names: Sequence[str]) -> Augmentation:
        """The augmentations but those of these names."""


@dataclasses.dataclass(frozen=True)
class LastEpochs:
    """HOOK.DisableAugmentationHook: from this epoch on, counted from 0, no augmentations of these names."""

    begin: int
    without: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SampleFrame:
    """What a sample was made of, for predictions, scores and pictures.

    points: (N, 4) float32 as the voxels were made of them; None in training
    """

    name: str
    annotations: Annotations
    calibration: Calibration
    points: NDArray[np.float32] | None


class LidarDataset(Dataset[dict[str, Any]]):
    """Samples of a source; random numbers are drawn in training only, from numpy's global generator.

    most_frames: that the source has, if each epoch is to take others; these come again after so many
    """

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        class_names: Sequence[str],
        training: bool,
        augmentor: Augmentation | None = None,
        last_epochs: LastEpochs | None = None,
        most_frames: int | None = None,
    ) -> None:
        self.first, self.most_frames = 0, most_frames
        self.source, self.options, self.class_names, self.training = source, options, list(class_names), training
        self.augmentor, self.last_epochs = augmentor, last_epochs
        self.active = augmentor
        self.processors = options.processors
        mode = "train" if training else "test"
        self.shuffles = self.processors.shuffle is not None and getattr(self.processors.shuffle.SHUFFLE_ENABLED, mode)
        self.voxels = Voxels(
            options.POINT_CLOUD_RANGE,
            self.processors.voxels.VOXEL_SIZE,
            self.processors.voxels.MAX_POINTS_PER_VOXEL,
            getattr(self.processors.voxels.MAX_NUMBER_OF_VOXELS, mode),
        )

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        if self.most_frames is not None:
            self.first = epoch * len(self.source)
        last = self.last_epochs
        if self.augmentor is not None and last is not None:
            self.active = self.augmentor.without(last.without) if epoch >= last.begin else self.augmentor

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        voxels:           (V, P, 4) float32
        voxel_coords:     (V, 3) int32, z y x
        voxel_num_points: (V,) int32
        gt_boxes:         (M, 8) float32: box in the lidar frame, and its class from 1 on
        frame:            SampleFrame
        """
        number = self.first + index
        frame = self.source.frame(number if self.most_frames is None else number % self.most_frames)
        points, boxes, names = self._in_range(*self._objects(frame))
        if self.shuffles:
            points = points[np.random.permutation(len(points))]
        voxels, coords, num_points = self.voxels(points)
        classes = [self.class_names.index(name) + 1 for name in names]
        return {
            "voxels": voxels,
            "voxel_coords": coords,
            "voxel_num_points": num_points,
            "gt_boxes": np.column_stack([boxes, np.array(classes, dtype=np.float64)]).astype(np.float32),
            "frame": SampleFrame(frame.name, frame.annotations, frame.calibration, None if self.training else points),
        }

    def _objects(self, frame: Frame) -> Objects:
        """What the camera sees of `frame`, augmented in training, and its objects of the classes to be found.

        Objects of other classes go through the augmentation too: nothing shall be pasted where they stand.
        """
        points = frame.points[frame.calibration.in_view(frame.points)] if self.options.FOV_POINTS_ONLY else frame.points
        labelled = frame.annotations.names != "DontCare"
        boxes, names = frame.boxes[labelled], frame.annotations.names[labelled]
        if self.training and self.active is not None:
            points, boxes, names = self.active(points, boxes, names)
        boxes = np.column_stack([boxes[:, :6], wrapped(boxes[:, 6])])
        wanted = np.isin(names, self.class_names) & (boxes[:, 3:6] > 0).all(1)  # no anchor encodes an extent of 0
        return points, boxes[wanted], names[wanted]

    def _in_range(self, points: NDArray[np.float32], boxes: NDArray[np.float64], names: NDArray[np.str_]) -> Objects:
        """Points and boxes in POINT_CLOUD_RANGE: points seen from above, as OpenPCDet has it; voxels cut z.

        Boxes are cut in evaluation too, where OpenPCDet keeps them in the batch: what is out of range has no anchors.
        """
        mask = self.processors.mask
        if mask is None:
            return points, boxes, names
        low, high = np.split(np.array(self.options.POINT_CLOUD_RANGE, dtype=np.float32), 2)
        x, y = points[:, 0], points[:, 1]
        points = points[(x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1])]
        if not mask.REMOVE_OUTSIDE_BOXES:
            return points, boxes, names
        kept = boxes_in_range(boxes, low, high, mask)
        return points, boxes[kept], names[kept]


def boxes_in_range(
    boxes: NDArray[np.float64], low: NDArray[np.float32], high: NDArray[np.float32], mask: Mask
) -> NDArray[np.bool_]:
    """(M, 7) -> (M,): by its centre, OpenPCDet's way unless told otherwise, or by its corners seen from above.

    By its centre, because only there can an anchor be its own; half a car beyond the border teaches nothing.
    """
    if mask.USE_CENTER_TO_FILTER:
        return np.asarray(((boxes[:, :3] >= low) & (boxes[:, :3] <= high)).all(axis=1))
    flat = corners(boxes)[:, :, :2]  # (M, 8, 2)
    return np.asarray(((flat >= low[:2]) & (flat <= high[:2])).all(axis=2).sum(axis=1) >= mask.min_num_corners)


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of samples.

    voxels, voxel_num_points: of all samples, one after another
    voxel_coords: (V, 4) int32: number of the sample, z y x
    gt_boxes:     (B, M, 8) float32, M that of the sample with the most, 1 at least; filled up with zeros
    frame:        list of SampleFrame
    """
    coords = [np.pad(sample["voxel_coords"], ((0, 0), (1, 0)), constant_values=i) for i, sample in enumerate(samples)]
    most = max(1, *(len(sample["gt_boxes"]) for sample in samples))
    gt_boxes = np.zeros((len(samples), most, 8), dtype=np.float32)
    for row, sample in zip(gt_boxes, samples, strict=True):
        row[: len(sample["gt_boxes"])] = sample["gt_boxes"]
    return {
        "voxels": np.concatenate([sample["voxels"] for sample in samples]),
        "voxel_coords": np.concatenate(coords),
        "voxel_num_points": np.concatenate([sample["voxel_num_points"] for sample in samples]),
        "gt_boxes": gt_boxes,
        "frame": [sample["frame"] for sample in samples],
    }
