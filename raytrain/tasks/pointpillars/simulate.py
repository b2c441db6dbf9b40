"""LiDAR scenes by ray-casting, labelled as KITTI labels its own: a source of frames that needs no download.

Scene i of a split and a seed is always the same bits. Labels hold what a label file holds, two decimals, and the
shapes are cast from the boxes that those give, so that a frame is equal to itself written and read back.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from raytrain.config.overrides import apply_overrides
from raytrain.config.schema import plain
from raytrain.config.sections import Count, Natural, NonNegative, Positive, Section
from raytrain.config.yaml_text import node_of
from raytrain.errors import DataError
from raytrain.tasks.pointpillars.data_options import Number, read_section
from raytrain.tasks.pointpillars.frames import IMAGE_SIZE, Annotations, Calibration, Frame, boxes_of, corners, wrapped
from raytrain.tasks.pointpillars.kitti import write_frame, write_split
from raytrain.tasks.pointpillars.raycast import Scan, View, look, scan_of
from raytrain.tasks.pointpillars.scenes import (
    KINDS,
    LABELS,
    SENSOR_HEIGHT_M,
    Material,
    Scene,
    Solids,
    draw_scene,
    solids_of,
)

SECTION = "DATA_CONFIG.SIMULATION"
SPLITS = ("train", "val")
MOST_SCENES = 500_000
FIRST_NAMES = {"train": 0, "val": MOST_SCENES}  # six digits: no name is in both splits
NEAREST_DEPTH_M = 0.1  # a corner that is not that far before the camera is projected as if it were
HIDDEN = (0.2, 0.6)  # shares of an object's rays taken by what is nearer, above which it is partly, largely occluded
WAVES_M = (3.0, 11.0)  # lengths of the ground's bumps
ASPHALT = Material(0.28, 1.0)
STEPS = np.array([1000, 1000, 1000, 100])  # in a metre, and in full reflectance: KITTI's points are as coarse
CALIBRATION = (
    Calibration(  # focal length and image centre of KITTI's camera 2; axes exactly permuted, as no KITTI car's
        P2=np.array([[721.5377, 0.0, 609.5593, 0.0], [0.0, 721.5377, 172.854, 0.0], [0.0, 0.0, 1.0, 0.0]]),
        R0_rect=np.eye(3),
        Tr_velo_to_cam=np.array([[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -1.0, -0.08], [1.0, 0.0, 0.0, -0.27]]),
    )
)

NumScenes = Annotated[Natural, Field(le=MOST_SCENES)]
Interval = Annotated[list[Natural], Field(min_length=2, max_length=2)]  # least and most, both included
Angle = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=-90, lt=90)]


class Splits(Section):
    train: NumScenes = 1000
    val: NumScenes = 200


class SimulationOptions(BaseModel):
    """DATA_CONFIG.SIMULATION: the scanner, and what stands in its scenes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    NUM_SCENES: Splits = Splits()
    NEW_EACH_EPOCH: Annotated[bool, Field(strict=True)] = False  # NUM_SCENES.train of them, which no epoch before had
    BEAMS: Annotated[Count, Field(le=1024)] = 64
    ELEVATION_DEG: Annotated[list[Angle], Field(min_length=2, max_length=2)] = [-24.9, 2.0]  # lowest, highest beam
    AZIMUTH_STEP_DEG: Annotated[Positive, Field(ge=0.01, le=90)] = 0.2
    FIELD_OF_VIEW_DEG: Annotated[Positive, Field(le=360)] = 360.0  # only this sector, in front, is cast
    MAX_RANGE_M: Positive = 80.0
    RANGE_NOISE_M: NonNegative = 0.02  # standard deviation
    DROPOUT: Annotated[NonNegative, Field(le=1)] = 0.04  # share of echoes lost of asphalt near by; far and aslant: more
    EXTENT_M: Annotated[list[Number], Field(min_length=4, max_length=4)] = [0.0, -40.0, 70.0, 40.0]  # x0 y0 x1 y1
    CARS: Interval = [6, 14]
    VANS: Interval = [0, 3]
    PEDESTRIANS: Interval = [2, 8]
    CYCLISTS: Interval = [1, 5]
    POLES: Interval = [4, 12]
    WALLS: Interval = [1, 4]
    SLOPE: Annotated[NonNegative, Field(le=0.2)] = 0.02  # the steepest the ground may be along x and along y
    ROUGHNESS_M: NonNegative = 0.015  # height of its bumps

    @field_validator("CARS", "VANS", "PEDESTRIANS", "CYCLISTS", "POLES", "WALLS")
    @classmethod
    def _ordered(cls, value: list[int]) -> list[int]:
        if value[0] > value[1] or value[1] > 100:
            raise ValueError("it must be [least, most], of which neither is above 100")
        return value

    @field_validator("ELEVATION_DEG")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if value[0] > value[1]:
            raise ValueError("it must be [lowest, highest]")
        return value

    @field_validator("EXTENT_M")
    @classmethod
    def _area(cls, value: list[float]) -> list[float]:
        if value[0] > value[2] or value[1] > value[3]:
            raise ValueError("it must be [x0, y0, x1, y1] with x0 <= x1 and y0 <= y1")
        return value

    @property
    def counts(self) -> dict[str, list[int]]:
        return {key: getattr(self, key) for key in KINDS}


def simulation_options(found: Mapping[str, Any], words: Sequence[str] = ()) -> SimulationOptions:
    """The options of a config's section and of the `--set` words after it; ConfigError names what is wrong there."""
    root = node_of(plain(found), SECTION)
    apply_overrides(root, words, SimulationOptions)
    return read_section(SimulationOptions, SECTION, root.plain())


class SimulatedSource:
    """The frames of one split. Nothing is stored: a frame is cast anew each time it is asked for."""

    def __init__(self, options: SimulationOptions, split: str, seed: int) -> None:
        self.options = options
        self.split = split
        self.seed = seed

    def __len__(self) -> int:
        return int(getattr(self.options.NUM_SCENES, self.split))

    def name(self, index: int) -> str:
        """Six digits, as KITTI has them."""
        return f"{FIRST_NAMES[self.split] + index:06d}"

    def frame(self, index: int) -> Frame:
        """Scene `index`, the same bits each time; NEW_EACH_EPOCH has later epochs' behind those of the first."""
        if not 0 <= index < (MOST_SCENES if self.options.NEW_EACH_EPOCH else len(self)):
            raise IndexError(f"scene {index} of {len(self)} in split {self.split}")
        random = Generator(PCG64(SeedSequence([self.seed, SPLITS.index(self.split), index])))
        scene, annotations = labelled(
            draw_scene(self.options.counts, self.options.EXTENT_M, self.options.SLOPE, random)
        )
        points, owner, hidden = sweep(scene, self.options, random)
        return Frame(self.name(index), points, with_view(annotations, scene, points, owner, hidden), CALIBRATION)


def two(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rounded to the two decimals of a label file: the very numbers that reading gives. No -0."""
    return np.round(values, 2) + 0.0


def labelled(scene: Scene) -> tuple[Scene, Annotations]:
    """The scene with the boxes that label files can hold, and the labels of all its objects, seen or not."""
    bottom = scene.boxes[:, :3] - [[0, 0, 0.5]] * scene.boxes[:, 5:6]
    location = two(CALIBRATION.to_camera(bottom))
    rotation_y = two(np.remainder(-scene.boxes[:, 6] + np.pi / 2, 2 * np.pi) - np.pi)
    observed = rotation_y - np.arctan2(location[:, 0], location[:, 2])
    annotations = Annotations(
        names=np.array([str(LABELS[kind]) for kind in scene.kinds], dtype=np.str_),
        truncated=np.zeros(len(location)),
        occluded=np.zeros(len(location)),
        alpha=two(wrapped(observed)),
        bbox=np.zeros((len(location), 4)),
        dimensions=two(scene.boxes[:, [3, 5, 4]]),
        location=location,
        rotation_y=rotation_y,
    )
    return dataclasses.replace(scene, boxes=boxes_of(annotations, CALIBRATION)), annotations


def sweep(
    scene: Scene, options: SimulationOptions, random: Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """One turn of the scanner: points (N, 4), each one's object (N,), -1 for the ground, and View.hidden (M,)."""
    low, high = options.ELEVATION_DEG
    scan = scan_of(options.BEAMS, (low, high), options.AZIMUTH_STEP_DEG, options.FIELD_OF_VIEW_DEG, random.random())
    solids = solids_of(scene)
    view = look(scan, solids, len(scene.boxes), scene.slope, SENSOR_HEIGHT_M)
    points, solid = echoes(scan, view, solids, options, random)
    owner = np.append(solids.owner, -1)[solid]
    return points, owner, view.hidden


def echoes(
    scan: Scan, view: View, solids: Solids, options: SimulationOptions, random: Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Points (N, 4) of the rays whose echo comes back, to the millimetre and to 1 % as KITTI has them; their solids."""
    num_azimuths = len(scan.cos)
    length = np.repeat(np.sqrt(1 + scan.tan**2), num_azimuths)
    ray = np.flatnonzero(view.t * length <= options.MAX_RANGE_M)
    reflectance, loss = (np.append(column, last) for column, last in zip(solids.material.T, ASPHALT, strict=True))
    share = view.t[ray] * length[ray] / options.MAX_RANGE_M
    aslant = np.square(1 - view.facing[ray])
    lost = options.DROPOUT * (loss[view.solid[ray]] + 4 * np.square(share) + 4 * np.square(aslant))
    ray = ray[random.random(len(ray), dtype=np.float32) >= lost]
    beam = np.repeat(np.arange(len(scan.tan)), num_azimuths)[ray]
    azimuth = ray - beam * num_azimuths
    cos, sin, t, solid = scan.cos[azimuth], scan.sin[azimuth], view.t[ray], view.solid[ray]
    bumps = np.where(solid < 0, roughness(t * cos, t * sin, random), 0)
    t *= 1 - options.ROUGHNESS_M / SENSOR_HEIGHT_M * bumps
    t += options.RANGE_NOISE_M * random.standard_normal(len(t), dtype=np.float32) / length[ray]
    glare = reflectance[solid] * (0.35 + 0.65 * view.facing[ray]) * (1 + 0.2 * bumps)
    glare *= 0.9 + 0.2 * random.random(len(t), dtype=np.float32)
    points = np.stack([t * cos, t * sin, t * scan.tan[beam], glare.clip(0, 0.99)], axis=-1)
    return (np.rint(points * STEPS) / STEPS).astype(np.float32), solid


def roughness(x: NDArray[np.float64], y: NDArray[np.float64], random: Generator) -> NDArray[np.float32]:
    """Height of the bumps at (x, y), -1 to 1: two waves across each other, and gravel."""
    waves = np.ones(len(x), dtype=np.float32)
    for length, turn, phase in zip(WAVES_M, *random.uniform(0, 2 * np.pi, (2, 2)), strict=True):
        number = 2 * np.pi / length
        angle = (number * np.cos(turn)) * x + (number * np.sin(turn)) * y + phase
        waves *= np.sin(angle.astype(np.float32))
    gravel = 2 * random.random(len(x), dtype=np.float32) - 1
    return np.float32(0.6) * waves + np.float32(0.4) * gravel


def with_view(
    annotations: Annotations,
    scene: Scene,
    points: NDArray[np.float32],
    owner: NDArray[np.int64],
    hidden: NDArray[np.float64],
) -> Annotations:
    """The labels of those objects of which the camera sees a point, with what is seen of them."""
    on_object = np.flatnonzero(owner >= 0)
    seen = on_object[CALIBRATION.in_view(points[on_object])]
    num_seen = np.bincount(owner[seen], minlength=len(scene.boxes))
    is_label = np.array([LABELS[kind] is not None for kind in scene.kinds], dtype=bool)
    chosen = np.flatnonzero((num_seen > 0) & is_label)
    bbox, truncated = outlines(scene.boxes[chosen])
    occluded = np.searchsorted(HIDDEN, hidden[chosen], side="right").astype(np.float64)
    return dataclasses.replace(annotations.only(chosen), bbox=two(bbox), truncated=two(truncated), occluded=occluded)


def outlines(boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """bbox (M, 4) of boxes (M, 7) in the image, and the share (M,) of the whole outline that lies outside of it."""
    camera = CALIBRATION.to_camera(corners(boxes).reshape(-1, 3))
    camera[:, 2] = np.maximum(camera[:, 2], NEAREST_DEPTH_M)
    pixels = CALIBRATION.to_image(camera)[0].reshape(-1, 8, 2)
    low, high = pixels.min(1), pixels.max(1)
    edge = np.array(IMAGE_SIZE) - 1.0
    inner_low, inner_high = low.clip(0, edge), high.clip(0, edge)
    inside = (inner_high - inner_low).prod(1) / (high - low).prod(1)
    return np.concatenate([inner_low, inner_high], axis=1), 1 - inside


def write_scenes(
    out: str | os.PathLike[str], options: SimulationOptions, splits: Sequence[str], seed: int
) -> dict[str, int]:
    """Writes the scenes in KITTI's layout, for the kitti source; how many of each split.

    ImageSets/<split>.txt, which names the frames, comes last: without it a split was not finished.
    """
    folder = Path(out)
    sources = [source for split in splits if len(source := SimulatedSource(options, split, seed))]
    if not sources:
        raise DataError(
            f"there is nothing to write: NUM_SCENES is 0 for {' and '.join(splits)}; ask for some with --scenes"
        )
    for source in sources:
        path = folder / "ImageSets" / f"{source.split}.txt"
        if path.exists():
            raise DataError(f"{path} is there already; name another folder, or remove this one")
    try:
        for source in sources:
            for index in range(len(source)):
                frame = source.frame(index)
                if not len(frame.points):
                    raise DataError(
                        f"scene {frame.name} has no point, and KITTI's files have one at least; "
                        f"{SECTION}.MAX_RANGE_M or DROPOUT leaves none"
                    )
                write_frame(folder, frame)
            write_split(folder, source.split, [source.name(index) for index in range(len(source))])
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written: {error.strerror} ({error.filename}); name another folder"
        ) from error
    return {source.split: len(source) for source in sources}
