"""One LiDAR frame and its labels, in KITTI's terms, and the way between camera and LiDAR coordinates.

Frames of reference (Geiger et al., CVPR 2012):
lidar    x forward, y left, z up; a box is (x, y, z, dx, dy, dz, heading): its centre, its length along the
         heading, width and height in metres, and the heading, counter-clockwise from x, in radians
camera   x right, y down, z forward, rectified; an object's location is the middle of its bottom face, and
         rotation_y turns from x towards -z: heading = -rotation_y - pi / 2
image    pixels of the left colour camera
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = (1242, 375)  # pixels, width and height of most frames; the images themselves are not needed


class Difficulty(NamedTuple):
    """What a ground truth may be at most to count, and its least height in pixels, which it must exceed."""

    name: str
    height: float
    occluded: float
    truncated: float


DIFFICULTIES = (Difficulty("easy", 40, 0, 0.15), Difficulty("moderate", 25, 1, 0.3), Difficulty("hard", 25, 2, 0.5))


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The labelled or detected objects of one frame, one row each, as a KITTI label file has them.

    names:      (M,) str; a label file's DontCare rows are among them
    truncated:  (M,) float64, 0 to 1, or -1 for unknown
    occluded:   (M,) float64, 0 to 3, or -1
    alpha:      (M,) float64, observation angle in radians
    bbox:       (M, 4) float64, x1 y1 x2 y2 in pixels
    dimensions: (M, 3) float64, length, height, width in metres (a label file has height, width, length)
    location:   (M, 3) float64, camera x y z in metres, the middle of the bottom face
    rotation_y: (M,) float64, radians
    scores:     (M,) float64 of detections; None for labels
    """

    names: NDArray[np.str_]
    truncated: NDArray[np.float64]
    occluded: NDArray[np.float64]
    alpha: NDArray[np.float64]
    bbox: NDArray[np.float64]
    dimensions: NDArray[np.float64]
    location: NDArray[np.float64]
    rotation_y: NDArray[np.float64]
    scores: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def only(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Annotations:
        """Those rows, by a mask or by their numbers."""
        columns: dict[str, Any] = dict(vars(self))
        for name, column in columns.items():
            columns[name] = None if column is None else column[chosen]
        return Annotations(**columns)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Where the camera is.

    P2:             (3, 4) float64, rectified camera to image
    R0_rect:        (3, 3) float64, camera to rectified camera
    Tr_velo_to_cam: (3, 4) float64, lidar to camera
    """

    P2: NDArray[np.float64]
    R0_rect: NDArray[np.float64]
    Tr_velo_to_cam: NDArray[np.float64]

    def to_camera(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, 3) lidar -> (N, 3) rectified camera."""
        return (points @ self.Tr_velo_to_cam[:, :3].T + self.Tr_velo_to_cam[:, 3]) @ self.R0_rect.T

    def to_lidar(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, 3) rectified camera -> (N, 3) lidar."""
        camera = np.linalg.solve(self.R0_rect, points.T).T - self.Tr_velo_to_cam[:, 3]
        return np.asarray(np.linalg.solve(self.Tr_velo_to_cam[:, :3], camera.T).T, dtype=np.float64)

    def to_image(self, points: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N, 3) rectified camera -> pixels (N, 2), and depth (N,) in metres before the image plane."""
        projected = points @ self.P2[:, :3].T + self.P2[:, 3]
        return projected[:, :2] / projected[:, 2:3], projected[:, 2] - self.P2[2, 3]

    def in_view(self, points: NDArray[np.floating]) -> NDArray[np.bool_]:
        """(N,): which of these lidar points (N, 3 or more) the camera sees: `to_image` of `to_camera`, in one go.

        Compared before the division, so that a point at the camera's very place is no special case.
        """
        camera = self.R0_rect @ self.Tr_velo_to_cam  # (3, 4)
        image = self.P2[:, :3] @ camera
        image[:, 3] += self.P2[:, 3]
        x, y, z = points[:, :3].T.astype(np.float64)  # (N,) each
        # Not a matrix product, which may round otherwise with another number of threads.
        u, v, depth = (row[0] * x + row[1] * y + row[2] * z + row[3] for row in image)  # (N,): pixels times depth
        inside = (u >= 0) & (v >= 0) & (u < IMAGE_SIZE[0] * depth) & (v < IMAGE_SIZE[1] * depth)
        return np.asarray(inside & (depth >= max(0.0, self.P2[2, 3])))


@dataclasses.dataclass(frozen=True)
class Frame:
    """What a source gives of one sweep.

    name:        six digits, as KITTI names its files
    points:      (N, 4) float32: x y z in metres, lidar, and reflectance 0 to 1
    annotations: all labelled objects, DontCare too
    calibration: of this frame
    """

    name: str
    points: NDArray[np.float32]
    annotations: Annotations
    calibration: Calibration

    @property
    def boxes(self) -> NDArray[np.float64]:
        """(M, 7), lidar, in the order of `annotations`; meaningless rows where the object is DontCare."""
        return boxes_of(self.annotations, self.calibration)


class Source(Protocol):
    """Where frames come from; frame(index) always gives the same bits."""

    def __len__(self) -> int: ...

    def frame(self, index: int) -> Frame: ...


def boxes_of(annotations: Annotations, calibration: Calibration) -> NDArray[np.float64]:
    """(M, 7) boxes in the lidar frame."""
    if len(annotations) == 0:
        return np.zeros((0, 7))
    length, height, width = annotations.dimensions.T
    centre = calibration.to_lidar(annotations.location)
    centre[:, 2] += height / 2
    return np.column_stack([centre, length, width, height, -(annotations.rotation_y + np.pi / 2)])


def annotations_of(
    names: NDArray[np.str_],
    boxes: NDArray[np.floating],
    calibration: Calibration,
    scores: NDArray[np.floating] | None = None,
) -> Annotations:
    """Boxes (M, 7) of the lidar frame as KITTI has objects; the inverse of `boxes_of`.

    bbox is what of the box's eight corners lies in the image. truncated and occluded are -1: unknown.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 7)
    bottom = boxes[:, :3].copy()
    bottom[:, 2] -= boxes[:, 5] / 2
    location = calibration.to_camera(bottom)
    rotation_y = wrapped(-boxes[:, 6] - np.pi / 2)
    alpha = rotation_y - np.arctan2(location[:, 0], location[:, 2])
    pixels, _ = calibration.to_image(calibration.to_camera(corners(boxes).reshape(-1, 3)))
    pixels = np.clip(pixels.reshape(-1, 8, 2), 0, np.array(IMAGE_SIZE) - 1.0)
    unknown = np.full(len(boxes), -1.0)
    return Annotations(
        np.asarray(names),
        unknown,
        unknown.copy(),
        wrapped(alpha),
        np.concatenate([pixels.min(1), pixels.max(1)], axis=1) if len(boxes) else np.zeros((0, 4)),
        boxes[:, [3, 5, 4]],
        location,
        rotation_y,
        None if scores is None else np.asarray(scores, dtype=np.float64),
    )


def wrapped(angle_rad: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same angles in [-pi, pi)."""
    return (angle_rad + np.pi) % (2 * np.pi) - np.pi


def corners(boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """(M, 7) -> (M, 8, 3): the corners of each box, the lower four first, counter-clockwise."""
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    flat = signs[None] * boxes[:, None, 3:5]
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    x = flat[..., 0] * cos - flat[..., 1] * sin + boxes[:, 0, None]
    y = flat[..., 0] * sin + flat[..., 1] * cos + boxes[:, 1, None]
    low = np.repeat((boxes[:, 2] - boxes[:, 5] / 2)[:, None], 4, axis=1)
    return np.concatenate([np.stack([x, y, low], -1), np.stack([x, y, low + boxes[:, 5, None]], -1)], axis=1)


def points_in_boxes(points: NDArray[np.floating], boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(M, N): which of the points (N, 3 or more) lie in which box (M, 7), faces included."""
    offset = points[None, :, :3] - boxes[:, None, :3]
    cos, sin = np.cos(boxes[:, 6])[:, None], np.sin(boxes[:, 6])[:, None]
    along = offset[..., 0] * cos + offset[..., 1] * sin
    across = offset[..., 1] * cos - offset[..., 0] * sin
    half = boxes[:, None, 3:6] / 2
    inside = (np.abs(along) <= half[..., 0]) & (np.abs(across) <= half[..., 1])
    return np.asarray(inside & (np.abs(offset[..., 2]) <= half[..., 2]))
