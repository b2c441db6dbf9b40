"""Frames in KITTI's layout: the three genuine ones, where they are, and made-up ones."""

from pathlib import Path

import numpy as np
import pytest

from raytrain.tasks.pointpillars.frames import Annotations, Calibration, Frame
from raytrain.tasks.pointpillars.kitti import write_frame, write_split

KITTI_MINI = Path(__file__).parents[3] / "shared" / "kitti-mini"
MINI_NAMES = ["000000", "000001", "000008"]


def kitti_mini(folder: Path) -> Path:
    """A KITTI folder below `folder` of the three frames, by links: nothing is written where they are kept."""
    if not KITTI_MINI.exists():
        pytest.skip(f"{KITTI_MINI}, three genuine KITTI frames, is not here")
    root = folder / "kitti-mini"
    root.mkdir()
    (root / "training").symlink_to(KITTI_MINI / "training")
    for split in ("train", "val"):
        write_split(root, split, MINI_NAMES)
    return root


# x forward becomes z forward, y left x right, z up y down; the camera is 0.3 m before the lidar and 0.1 m below.
CALIBRATION = Calibration(
    P2=np.array([[700.0, 0, 600, 45], [0, 700, 180, -0.3], [0, 0, 1, 0.005]]),
    R0_rect=np.eye(3),
    Tr_velo_to_cam=np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.1], [1, 0, 0, -0.3]]),
)


def made_up_frame(name: str, names: tuple[str, ...] = ("Car", "Pedestrian"), num_points: int = 500) -> Frame:
    """Random points all around and random objects ahead, the same for the same name; numbers of two decimals."""
    draw = np.random.RandomState(int(name))
    points = draw.uniform([-30, -30, -2, 0], [30, 30, 1, 1], (num_points, 4)).astype(np.float32)
    count = len(names)
    annotations = Annotations(
        names=np.array(names, dtype=np.str_),
        truncated=np.zeros(count),
        occluded=np.arange(count) % 4.0,
        alpha=np.round(draw.uniform(-3, 3, count), 2),
        bbox=np.round(draw.uniform([0, 0, 200, 200], [200, 200, 370, 370], (count, 4)), 2),
        dimensions=np.round(draw.uniform(0.5, 4, (count, 3)), 2),
        location=np.round(draw.uniform([-5, 1, 10], [5, 2, 25], (count, 3)), 2),
        rotation_y=np.round(draw.uniform(-3, 3, count), 2),
    )
    return Frame(name, points, annotations, CALIBRATION)


def write_kitti(root: Path, frames: list[Frame], split: str = "train") -> Path:
    for frame in frames:
        write_frame(root, frame)
    write_split(root, split, [frame.name for frame in frames])
    return root


def assert_same_bits(a: Frame, b: Frame) -> None:
    assert a.name == b.name and a.points.tobytes() == b.points.tobytes()
    assert a.annotations.names.tolist() == b.annotations.names.tolist()
    for part in ("annotations", "calibration"):
        for field, value in vars(getattr(a, part)).items():
            other = getattr(getattr(b, part), field)
            assert (value is None and other is None) or field == "names" or value.tobytes() == other.tobytes(), field
