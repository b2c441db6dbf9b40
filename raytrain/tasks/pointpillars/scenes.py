"""What stands in a simulated scene: which objects, how large, where and how turned, and the shapes they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SENSOR_HEIGHT_M = 1.73  # of KITTI's LiDAR above the road
SKIN_M = 0.04  # how far shapes stay inside their boxes: two sigma of the default range noise, else half of the
#                points of a flat side would lie outside the box that is labelled
GAP_M = 0.2  # kept around each object
DISCS = 6  # discs in a row that stand for an object where two may not overlap
ROUNDS = 12  # tries to find a free place
CURVE_RAD = 0.06  # how far, as a standard deviation, traffic stands off the direction of the road


class Material(NamedTuple):
    """reflectance: 0 to 1, of a surface seen head on.   loss: how many times likelier than on asphalt no echo comes."""

    reflectance: float
    loss: float


PAINT, GLASS, RUBBER = Material(0.55, 1.0), Material(0.12, 8.0), Material(0.08, 2.0)
CLOTH, SKIN, METAL, PLASTER = Material(0.35, 1.0), Material(0.45, 1.0), Material(0.6, 1.5), Material(0.3, 1.0)


class Part(NamedTuple):
    """A convex piece of an object, in shares of its length, width and height.

    middle: (x, y), from the middle of the object
    height: (low, high), from the ground
    half:   (x, y), from the middle to the sides; a box's at its low end
    top:    the same at a box's high end, where that differs: a windscreen leans
    """

    shape: Literal["box", "cylinder", "ball"]
    material: Material
    middle: tuple[float, float]
    height: tuple[float, float]
    half: tuple[float, float]
    top: tuple[float, float] | None = None


class Kind(NamedTuple):
    """A sort of object: KITTI's name, or None for what has no label; what its size is, and of what it is made.

    size, spread: mean and standard deviation of length, width and height in metres; KITTI's training labels
    along_road:   share of those that stand along the road, either way
    apart_m:      how far from the sensor, whose own car takes up 3 m; a wall before it would leave nothing to see
    """

    label: str | None
    size: tuple[float, float, float]
    spread: tuple[float, float, float]
    along_road: float
    apart_m: float
    parts: tuple[Part, ...]


CAR = (
    Part("box", RUBBER, (0, 0), (0.0, 0.2), (0.42, 0.46)),
    Part("box", PAINT, (0, 0), (0.14, 0.6), (0.5, 0.5), (0.47, 0.46)),
    Part("box", GLASS, (-0.06, 0), (0.6, 0.93), (0.36, 0.45), (0.25, 0.38)),
    Part("box", PAINT, (-0.06, 0), (0.93, 1.0), (0.25, 0.38), (0.22, 0.36)),
)
VAN = (
    Part("box", RUBBER, (0, 0), (0.0, 0.16), (0.42, 0.46)),
    Part("box", PAINT, (0, 0), (0.1, 0.5), (0.5, 0.5), (0.49, 0.49)),
    Part("box", PAINT, (-0.06, 0), (0.5, 1.0), (0.43, 0.49), (0.39, 0.45)),
)
PEDESTRIAN = (
    Part("cylinder", CLOTH, (0.3, 0.18), (0.0, 0.48), (0.16, 0.17)),
    Part("cylinder", CLOTH, (-0.3, -0.18), (0.0, 0.48), (0.16, 0.17)),
    Part("ball", CLOTH, (0, 0), (0.36, 0.9), (0.36, 0.48)),
    Part("ball", SKIN, (0.02, 0), (0.86, 1.0), (0.15, 0.17)),
)
CYCLIST = (
    Part("box", RUBBER, (0.31, 0), (0.0, 0.38), (0.18, 0.06)),
    Part("box", RUBBER, (-0.31, 0), (0.0, 0.38), (0.18, 0.06)),
    Part("box", METAL, (0, 0), (0.2, 0.5), (0.26, 0.06)),
    Part("box", METAL, (0.22, 0), (0.5, 0.6), (0.03, 0.48)),
    Part("cylinder", CLOTH, (0, 0.2), (0.12, 0.52), (0.07, 0.12)),
    Part("cylinder", CLOTH, (0, -0.2), (0.18, 0.52), (0.07, 0.12)),
    Part("ball", CLOTH, (0, 0), (0.46, 0.92), (0.16, 0.42)),
    Part("ball", SKIN, (0.06, 0), (0.86, 1.0), (0.07, 0.19)),
)
KINDS: dict[str, Kind] = {  # the large ones first: they take their places first
    "WALLS": Kind(
        None, (14.0, 0.5, 3.0), (5.0, 0.1, 0.7), 0.85, 12.0, (Part("box", PLASTER, (0, 0), (0, 1), (0.5, 0.5)),)
    ),
    "VANS": Kind("Van", (5.06, 1.9, 2.2), (0.6, 0.15, 0.25), 0.8, 3.0, VAN),
    "CARS": Kind("Car", (3.9, 1.63, 1.53), (0.4, 0.1, 0.13), 0.7, 3.0, CAR),
    "CYCLISTS": Kind("Cyclist", (1.76, 0.6, 1.73), (0.16, 0.1, 0.09), 0.6, 3.0, CYCLIST),
    "PEDESTRIANS": Kind("Pedestrian", (0.84, 0.66, 1.76), (0.15, 0.1, 0.1), 0.2, 3.0, PEDESTRIAN),
    "POLES": Kind(
        None, (0.3, 0.3, 5.0), (0.06, 0.06, 1.0), 0.0, 3.0, (Part("cylinder", METAL, (0, 0), (0, 1), (0.5, 0.5)),)
    ),
}
LABELS = [kind.label for kind in KINDS.values()]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The objects of a scene and the ground they stand on.

    kinds: (M,) int64, numbers in KINDS.   boxes: (M, 7), lidar frame, upright, on the ground; they do not overlap
    shade: (M,), what an object's reflectance is multiplied by
    slope: (2,), metres the ground rises on each metre of x and y
    """

    kinds: NDArray[np.int64]
    boxes: NDArray[np.float64]
    shade: NDArray[np.float64]
    slope: NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Solids:
    """The convex pieces of all objects, one row each, lidar frame.

    owner:    (S,) int64, the object each belongs to
    centre:   (S, 3), metres.   heading: (S,), radians
    half:     (S, 3), metres from the centre to the sides, at half height
    taper:    (S, 2), metres that the half length and the half width shrink on each metre of height
    curved:   (S, 3), 1 / half ** 2 where the piece is an ellipse along that axis, else 0; a box has three zeros
    material: (S, 2), reflectance and loss
    """

    owner: NDArray[np.int64]
    centre: NDArray[np.float64]
    heading: NDArray[np.float64]
    half: NDArray[np.float64]
    taper: NDArray[np.float64]
    curved: NDArray[np.float64]
    material: NDArray[np.float64]

    def only(self, chosen: NDArray[np.int64]) -> Solids:
        return Solids(**{name: column[chosen] for name, column in vars(self).items()})


def draw_scene(
    counts: Mapping[str, Sequence[int]], extent_m: Sequence[float], steepest: float, random: Generator
) -> Scene:
    """A scene of as many objects of each kind as `counts` allows, [least, most], less those that find no room.

    extent_m: x0 y0 x1 y1 of the area in which their middles are
    steepest: limit of the ground's slope along x and along y
    """
    numbers = [int(random.integers(least, most, endpoint=True)) for least, most in (counts[key] for key in KINDS)]
    kinds = np.repeat(np.arange(len(KINDS)), numbers)
    table = np.array([[*kind.size, *kind.spread, kind.along_road, kind.apart_m] for kind in KINDS.values()])[kinds]
    size = table[:, :3] + table[:, 3:6] * random.standard_normal((len(kinds), 3)).clip(-2.5, 2.5)
    slope = random.uniform(-steepest, steepest, 2)
    road = random.uniform(-0.5, 0.5) + np.pi * random.integers(0, 2, len(kinds))
    road = road + CURVE_RAD * random.standard_normal(len(kinds))
    heading = np.where(random.random(len(kinds)) < table[:, 6], road, random.uniform(-np.pi, np.pi, len(kinds)))
    shade = random.uniform(0.3, 1.4, len(kinds))
    place, free = find_room(size, heading, table[:, 7], np.asarray(extent_m, dtype=np.float64), random)
    height = place[:, 0] * slope[0] + place[:, 1] * slope[1] - SENSOR_HEIGHT_M + size[:, 2] / 2
    boxes = np.column_stack([place, height, size, heading])
    return Scene(kinds[free], boxes[free], shade[free], slope)


def find_room(
    size: NDArray[np.float64],
    heading: NDArray[np.float64],
    apart_m: NDArray[np.float64],
    extent_m: NDArray[np.float64],
    random: Generator,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Places (M, 2) within the area, and which of them (M,) overlap none before them and are apart from the sensor.

    An object is taken as DISCS discs that cover its footprint, so what is free is free of the rectangle too.
    """
    along = (np.arange(DISCS) + 0.5) / DISCS - 0.5
    spread = along * size[:, :1]  # (M, DISCS)
    offset = np.stack([spread * np.cos(heading)[:, None], spread * np.sin(heading)[:, None]], axis=-1)
    radius = np.hypot(size[:, 0] / DISCS, size[:, 1]) / 2 + GAP_M
    place = random.uniform(extent_m[:2], extent_m[2:], (len(size), 2))
    free = overlap_none_before(place[:, None] + offset, radius, apart_m)
    for _ in range(ROUNDS):
        if free.all():
            break
        place[~free] = random.uniform(extent_m[:2], extent_m[2:], (int((~free).sum()), 2))
        free = overlap_none_before(place[:, None] + offset, radius, apart_m)
    return place, free


def overlap_none_before(
    discs: NDArray[np.float64], radius: NDArray[np.float64], apart_m: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(M,): whose discs (M, DISCS, 2) are apart from the sensor, and from those of all objects of lower numbers."""
    num, each = discs.shape[:2]
    x, y = discs.reshape(-1, 2).T
    squared = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2
    nearest = squared.reshape(num, each, num, each).min(axis=(1, 3), initial=np.inf)  # (M, M)
    touches = np.tril(nearest < (radius[:, None] + radius) ** 2, -1).any(1)
    return np.asarray(~touches & ((discs**2).sum(-1).min(1, initial=np.inf) > (radius + apart_m) ** 2))


def solids_of(scene: Scene) -> Solids:
    """The shapes of all objects of a scene, each within its box by SKIN_M at the sides and at the top."""
    pieces = [pieces_of(scene, np.flatnonzero(scene.kinds == number)) for number in np.unique(scene.kinds)]
    if not pieces:
        empty = [np.zeros((0, *shape)) for shape in ((3,), (), (3,), (2,), (3,), (2,))]
        return Solids(np.zeros(0, dtype=np.int64), *empty)
    names = [field.name for field in dataclasses.fields(Solids)]
    return Solids(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


def pieces_of(scene: Scene, members: NDArray[np.int64]) -> Solids:
    """The shapes of the objects with these numbers (n,), all of one kind with p parts: n * p rows."""
    parts = list(KINDS.values())[scene.kinds[members[0]]].parts
    box, inner = scene.boxes[members], scene.boxes[members, None, 3:6] - [2 * SKIN_M, 2 * SKIN_M, SKIN_M]  # (n, 1, 3)
    middle = np.array([part.middle for part in parts]) * inner[..., :2]  # (n, p, 2)
    ends = np.array([part.height for part in parts]) * inner[..., 2:]  # (n, p, 2), above the ground
    base = np.array([part.half for part in parts]) * inner[..., :2]
    top = np.array([part.top or part.half for part in parts]) * inner[..., :2]
    tall = ends[..., 1:] - ends[..., :1]  # (n, p, 1)
    half = np.concatenate([(base + top) / 2, tall / 2], axis=-1)
    cos, sin = np.cos(box[:, 6, None]), np.sin(box[:, 6, None])
    x = box[:, 0, None] + middle[..., 0] * cos - middle[..., 1] * sin
    y = box[:, 1, None] + middle[..., 0] * sin + middle[..., 1] * cos
    z = (box[:, 2] - box[:, 5] / 2)[:, None] + ends.mean(-1)
    curved = np.array([[part.shape != "box", part.shape != "box", part.shape == "ball"] for part in parts]) / half**2
    material = np.broadcast_to(np.array([part.material for part in parts]), (*x.shape, 2)).copy()
    material[..., 0] *= scene.shade[members, None]
    rows = [np.repeat(members, len(parts)), np.stack([x, y, z], axis=-1), np.repeat(box[:, 6], len(parts))]
    rows += [half, (base - top) / tall, curved, material]
    return Solids(*(row.reshape(len(members) * len(parts), *row.shape[2:]) for row in rows))
