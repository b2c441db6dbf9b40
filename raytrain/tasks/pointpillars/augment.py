"""Scenes changed at random for training, by OpenPCDet's names, keys and formulas.

Every draw is from numpy's global generator, which raytrain seeds for each sample: what is drawn is a
function of (seed, epoch, sample), whatever was loaded before and by whom.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from raytrain.config.schema import Tree
from raytrain.config.sections import Count, Flag, NonNegative, Positive, Section
from raytrain.errors import ConfigError, TaskError
from raytrain.tasks.pointpillars.data_options import Number, read_section
from raytrain.tasks.pointpillars.database import Counts, Database, Prepare, counts, ground_plane, inside, overlaps
from raytrain.tasks.pointpillars.frames import Source

SECTION = "DATA_CONFIG.DATA_AUGMENTOR"
NOTHING = "placeholder"  # what OpenPCDet's files have in a DISABLE_AUG_LIST that disables nothing
KITTI_TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")

Points = NDArray[np.float32]  # (N, 4) x y z in metres, lidar; reflectance
Boxes = NDArray[Any]  # (M, 7) float, lidar
Names = NDArray[np.str_]  # (M,)
Scene = tuple[Points, Boxes, Names]
Listed = Mapping[str, Any] | Sequence[Mapping[str, Any]]  # DATA_AUGMENTOR; a list is its AUG_CONFIG_LIST


def _rising(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("the first must not be above the second: least, most")
    return pair


Pair = Annotated[list[Number], Field(min_length=2, max_length=2), AfterValidator(_rising)]
Factors = Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(_rising)]
Widths = Annotated[list[NonNegative], Field(min_length=3, max_length=3)]


class DataAugmentor(Section):
    DISABLE_AUG_LIST: list[str] = Field(default=[])
    AUG_CONFIG_LIST: list[Tree] = Field(default=[])  # in the order in which they are applied


class GtSampling(Section):
    """Objects of other frames are put into the scene where nothing labelled stands.

    DB_INFO_PATH and DATABASE_WITH_FAKELIDAR are read and without effect: the database is made on the fly.
    """

    NAME: Literal["gt_sampling"]
    SAMPLE_GROUPS: Counts  # how many of a class are drawn, "Class:count"
    PREPARE: Prepare = Prepare()
    NUM_FRAMES: Count | None = None  # objects are cut out of the first ones, or of all; raytrain's own key
    LIMIT_WHOLE_SCENE: Flag = False  # counts are of the whole scene: those that are there are not drawn
    REMOVE_EXTRA_WIDTH: Widths = Field(default=[0.0, 0.0, 0.0])  # metres: how much larger the box is that is emptied
    USE_ROAD_PLANE: Flag = False  # objects stand on the scene's ground_plane; else as high as they were found
    NUM_POINT_FEATURES: Literal[4] = 4
    DB_INFO_PATH: list[str] = Field(default=[])
    DATABASE_WITH_FAKELIDAR: Flag = False


class RandomWorldFlip(Section):
    NAME: Literal["random_world_flip"]
    ALONG_AXIS_LIST: list[Literal["x", "y"]]  # the axis that stays as it is


class RandomWorldRotation(Section):
    NAME: Literal["random_world_rotation"]
    WORLD_ROT_ANGLE: Pair | NonNegative  # radians: least and most, or how far to both sides


class RandomWorldScaling(Section):
    NAME: Literal["random_world_scaling"]
    WORLD_SCALE_RANGE: Factors


Step = GtSampling | RandomWorldFlip | RandomWorldRotation | RandomWorldScaling
STEPS: dict[str, type[Step]] = {
    "gt_sampling": GtSampling,
    "random_world_flip": RandomWorldFlip,
    "random_world_rotation": RandomWorldRotation,
    "random_world_scaling": RandomWorldScaling,
}


class Augmentor:
    """The augmentations of DATA_CONFIG.DATA_AUGMENTOR, in their order, as a function of a scene.

    options:  that section, as the config has it
    database: what gt_sampling draws from; `Augmentor.of` makes it where it is needed
    """

    def __init__(self, options: Listed, class_names: Sequence[str], database: Database | None = None) -> None:
        self.steps = steps_of(options, class_names)
        self.database = database
        if database is None and any(isinstance(step, GtSampling) for step in self.steps):
            raise TaskError(f"{SECTION} has gt_sampling, which needs a database; Augmentor.of(...) makes it")

    @classmethod
    def of(cls, options: Listed, class_names: Sequence[str], source: Source) -> Augmentor:
        """The augmentor, with a database of the objects of `source` if one is needed."""
        for step in steps_of(options, class_names):
            if isinstance(step, GtSampling):
                wanted = [name for name in counts(step.SAMPLE_GROUPS) if name in class_names]
                return cls(options, class_names, Database.of(source, wanted, step.PREPARE, step.NUM_FRAMES))
        return cls(options, class_names)

    def without(self, names: Sequence[str]) -> Augmentor:
        """This augmentor less the augmentations of these names, as DISABLE_AUG_LIST has them."""
        for name in names:
            _known(name, "DISABLE_AUG_LIST", (*STEPS, NOTHING))
        rest = copy.copy(self)
        rest.steps = tuple(step for step in self.steps if step.NAME not in names)
        return rest

    def __call__(self, points: Points, boxes: Boxes, names: Names) -> Scene:
        """The scene, changed; what was given stays as it was. Headings come out in [-pi, pi).

        points: (N, 4) float32.   boxes: (M, 7), labelled objects of all classes, DontCare left out.   names: (M,) str.
        Boxes keep their dtype. Objects that gt_sampling adds come last, their points first.
        """
        for step in self.steps:
            if isinstance(step, GtSampling):
                assert self.database is not None
                points, boxes, names = with_objects(points, boxes, names, self.database, step)
            else:
                points, boxes = moved(points, boxes, step)
        boxes = boxes.copy()
        boxes[:, 6] -= 2 * np.pi * np.floor(boxes[:, 6] / (2 * np.pi) + 0.5)
        return points, boxes, names


def steps_of(options: Listed, class_names: Sequence[str]) -> tuple[Step, ...]:
    """The checked augmentations that are not disabled; ConfigError names the key that is wrong."""
    section = options if isinstance(options, Mapping) else {"AUG_CONFIG_LIST": options}
    listed = read_section(DataAugmentor, SECTION, section)
    for name in listed.DISABLE_AUG_LIST:
        _known(name, f"{SECTION}.DISABLE_AUG_LIST", (*STEPS, NOTHING))
    steps = []
    for number, entry in enumerate(listed.AUG_CONFIG_LIST):
        where = f"{SECTION}.AUG_CONFIG_LIST[{number}]"
        if "NAME" not in entry:
            raise ConfigError(f"{where}.NAME is missing; it must be one of {', '.join(STEPS)}")
        _known(entry["NAME"], f"{where}.NAME", tuple(STEPS))
        step = read_section(STEPS[entry["NAME"]], where, entry)
        if isinstance(step, GtSampling):
            _check_classes(step, where, class_names)
        if step.NAME not in listed.DISABLE_AUG_LIST:
            steps.append(step)
    if sum(isinstance(step, GtSampling) for step in steps) > 1:
        raise ConfigError(f"{SECTION}.AUG_CONFIG_LIST has gt_sampling twice; put all SAMPLE_GROUPS into one")
    return tuple(steps)


def _check_classes(step: GtSampling, where: str, class_names: Sequence[str]) -> None:
    """A class is one that is trained or, as in OpenPCDet, another of KITTI's, which is passed over."""
    named = {"SAMPLE_GROUPS": step.SAMPLE_GROUPS, "PREPARE.filter_by_min_points": step.PREPARE.filter_by_min_points}
    for key, words in named.items():
        for name in counts(words):
            _known(name, f"{where}.{key}", (*class_names, *KITTI_TYPES))


def _known(name: Any, where: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{where}: {name!r} is unknown; {hint}Known are {', '.join(dict.fromkeys(known))}")


def moved(
    points: Points, boxes: Boxes, step: RandomWorldFlip | RandomWorldRotation | RandomWorldScaling
) -> tuple[Points, Boxes]:
    """The scene flipped, turned or scaled by what is drawn."""
    if isinstance(step, RandomWorldFlip):
        for axis in step.ALONG_AXIS_LIST:
            if np.random.choice([False, True], p=[0.5, 0.5]):
                points, boxes = flipped(points, boxes, axis)
    elif isinstance(step, RandomWorldRotation):
        angle = step.WORLD_ROT_ANGLE
        least, most = angle if isinstance(angle, list) else (-angle, angle)
        points, boxes = turned(points, boxes, np.random.uniform(least, most))
    else:
        least, most = step.WORLD_SCALE_RANGE
        if most - least >= 1e-3:  # OpenPCDet draws and scales only then
            points, boxes = scaled(points, boxes, np.random.uniform(least, most))
    return points, boxes


def flipped(points: Points, boxes: Boxes, axis: str) -> tuple[Points, Boxes]:
    """Mirrored at the x axis (y changes sign) or at the y axis (x does)."""
    points, boxes = points.copy(), boxes.copy()
    column = {"x": 1, "y": 0}[axis]
    points[:, column] = -points[:, column]
    boxes[:, column] = -boxes[:, column]
    boxes[:, 6] = -boxes[:, 6] if axis == "x" else -(boxes[:, 6] + np.pi)
    return points, boxes


def turned(points: Points, boxes: Boxes, angle_rad: float) -> tuple[Points, Boxes]:
    """Turned about the z axis, counter-clockwise from above."""
    points, boxes = points.copy(), boxes.copy()
    for rows in (points, boxes):
        # Column by column: a matrix product may round otherwise with another number of threads.
        x, y = rows[:, 0].copy(), rows[:, 1].copy()
        cos, sin = rows.dtype.type(np.cos(angle_rad)), rows.dtype.type(np.sin(angle_rad))
        rows[:, 0] = x * cos - y * sin
        rows[:, 1] = x * sin + y * cos
    boxes[:, 6] += angle_rad
    return points, boxes


def scaled(points: Points, boxes: Boxes, factor: float) -> tuple[Points, Boxes]:
    """Made larger by `factor`, seen from the sensor."""
    return points * np.array([factor] * 3 + [1], points.dtype), boxes * np.array([factor] * 6 + [1], boxes.dtype)


def with_objects(points: Points, boxes: Boxes, names: Names, database: Database, step: GtSampling) -> Scene:
    """The scene with objects drawn from the database; the points that were where they stand now are gone."""
    chosen, added = chosen_objects(boxes.astype(np.float64), names, database, step)
    if len(chosen) == 0:
        return points, boxes, names
    plane = ground_plane(points) if step.USE_ROAD_PLANE else None
    if plane is not None:
        added[:, 2] = plane[0] + added[:, 0] * plane[1] + added[:, 1] * plane[2] + added[:, 5] / 2
    stays = np.ones(len(points), dtype=bool)
    for box in added + np.array([0, 0, 0, *step.REMOVE_EXTRA_WIDTH, 0]):
        stays[inside(points, box)] = False
    return (
        np.concatenate([database.points_of(chosen, added[:, :3]), points[stays]]),
        np.concatenate([boxes, added.astype(boxes.dtype)]),
        np.concatenate([names, np.array(database.class_names)[database.labels[chosen]]]),
    )


def chosen_objects(
    boxes: NDArray[np.float64], names: Names, database: Database, step: GtSampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Numbers (K,) and boxes (K, 7) of objects that are drawn, class after class, and fit into the scene.

    As in OpenPCDet one is dropped if it overlaps, seen from above, a labelled object, one added before, or
    another drawn one of its class. Unlike there, where a pointer walks through a shuffled list over all
    samples of a process, each sample draws without replacement from the whole class.
    """
    taken, chosen = boxes, [np.zeros(0, np.int64)]
    for name, count in counts(step.SAMPLE_GROUPS).items():
        if step.LIMIT_WHOLE_SCENE:
            count -= int((names == name).sum())
        if count > 0 and name in database.class_names:
            drawn = database.drawn(name, count)
            candidates = database.boxes[drawn]
            among = overlaps(candidates, candidates)
            np.fill_diagonal(among, False)
            free = ~(overlaps(candidates, taken).any(1) | among.any(1))
            taken = np.concatenate([taken, candidates[free]])
            chosen.append(drawn[free])
    return np.concatenate(chosen), taken[len(boxes) :]
