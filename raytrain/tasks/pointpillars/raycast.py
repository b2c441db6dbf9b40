"""What each ray of a spinning LiDAR meets first: ground or an object.

Only rays within the azimuths and elevations that a shape spans are tried against it, all such pairs of shape
and ray at once. Along a ray, `t` is the horizontal distance from the sensor: a point is t * (cos, sin, tan).
Elementwise arithmetic only: no BLAS, so that no number of threads changes a bit.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raytrain.tasks.pointpillars.frames import wrapped
from raytrain.tasks.pointpillars.scenes import Solids

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LEVEL = 1e-9  # tangent of a ray that is level: a true zero could not be divided by


@dataclasses.dataclass(frozen=True)
class Scan:
    """The rays of one turn or of a sector of it. Ray number = beam * A + azimuth.

    tan:        (B,), of the beams' elevations, rising
    cos, sin:   (A,), of the azimuths, counter-clockwise
    first_rad, step_rad: the azimuths' first and what lies between two
    per_turn:   steps of a whole turn
    """

    tan: Floats
    cos: Floats
    sin: Floats
    first_rad: float
    step_rad: float
    per_turn: int

    @property
    def num_rays(self) -> int:
        return len(self.tan) * len(self.cos)


class Hits(NamedTuple):
    """Rays that meet a shape, a row for each pair.

    t: metres.   facing: cosine of the angle between the ray and the surface's normal.   solid, ray: their numbers
    """

    t: Floats
    facing: Floats
    solid: Ints
    ray: Ints


class View(NamedTuple):
    """What the rays see.

    t:      (R,), metres to what is nearest; inf where nothing is met
    facing: (R,), as in Hits
    solid:  (R,) int64, whose surface it is; -1: the ground's, or nothing's
    hidden: (M,), share of each object's rays that something nearer takes; 0 where no ray meets it
    """

    t: Floats
    facing: Floats
    solid: Ints
    hidden: Floats


class Stretch(NamedTuple):
    """The part of each ray inside a shape so far: from `near` to `far`, entered at an angle of cosine `facing`."""

    near: Floats
    far: Floats
    facing: Floats

    def behind(self, rate: Floats, slack: Floats) -> Stretch:
        """What is also behind a plane, rate * t <= slack, whose normal's length is 1."""
        t = slack / rate
        enters = rate < 0
        later = enters & (t > self.near)
        far = np.where(enters, self.far, np.minimum(self.far, t))
        return Stretch(np.where(later, t, self.near), far, np.where(later, -rate, self.facing))


def scan_of(
    num_beams: int, elevation_deg: tuple[float, float], step_deg: float, field_of_view_deg: float, phase: float
) -> Scan:
    """The rays of a scanner whose azimuths begin `phase` of a step after the field of view does.

    The step is the nearest to `step_deg` that divides a turn.
    """
    per_turn = max(round(360 / step_deg), 1)
    step = 2 * np.pi / per_turn
    num_azimuths = max(round(per_turn * field_of_view_deg / 360), 1)
    first = (phase - num_azimuths / 2) * step
    azimuth = first + step * np.arange(num_azimuths)
    tan = np.tan(np.radians(np.linspace(*elevation_deg, num_beams)))
    tan[np.abs(tan) < LEVEL] = LEVEL
    return Scan(tan, np.cos(azimuth), np.sin(azimuth), first, step, per_turn)


def look(scan: Scan, solids: Solids, num_objects: int, slope: Floats, sensor_height_m: float) -> View:
    """What each ray meets first of the ground and of `solids`."""
    t, facing = ground(scan, slope, sensor_height_m)
    is_box = ~solids.curved.any(1)
    hits = [strikes(scan, solids, np.flatnonzero(chosen)) for chosen in (is_box, ~is_box)]
    hit = Hits(*(np.concatenate(columns) for columns in zip(*hits, strict=True)))
    np.minimum.at(t, hit.ray, hit.t)
    won = np.flatnonzero(hit.t == t[hit.ray])
    solid = np.full(scan.num_rays, -1)
    solid[hit.ray[won]] = hit.solid[won]
    facing[hit.ray[won]] = hit.facing[won]
    met = np.unique(solids.owner[hit.solid] * scan.num_rays + hit.ray) // scan.num_rays  # an object's parts count once
    seen = np.bincount(solids.owner[solid[solid >= 0]], minlength=num_objects)
    hidden = 1 - seen / np.maximum(np.bincount(met, minlength=num_objects), 1)
    return View(t, facing, solid, np.where(seen > 0, hidden, 0.0))


def ground(scan: Scan, slope: Floats, sensor_height_m: float) -> tuple[Floats, Floats]:
    """t (R,) at which rays meet the plane z = slope . (x, y) - sensor_height_m, inf if never, and `facing` (R,)."""
    sinks = (scan.cos * slope[0] + scan.sin * slope[1]) - scan.tan[:, None]  # (B, A)
    t = np.divide(sensor_height_m, sinks, out=np.full_like(sinks, np.inf), where=sinks > LEVEL)
    facing = sinks / np.sqrt((1 + scan.tan[:, None] ** 2) * (1 + slope[0] ** 2 + slope[1] ** 2))
    return t.ravel(), facing.ravel()


def strikes(scan: Scan, solids: Solids, chosen: Ints) -> Hits:
    """Where rays meet those of the solids, which are all boxes or all round."""
    row, beam, azimuth = candidates(scan, solids, chosen)
    of = chosen[row]
    x, y, up = scan.cos[azimuth], scan.sin[azimuth], scan.tan[beam]
    cos, sin = np.cos(solids.heading)[of], np.sin(solids.heading)[of]
    ray = np.stack([x * cos + y * sin, y * cos - x * sin, up])  # (3, P), along, across and up
    origin = -to_local(solids, solids.centre)  # (S, 3), the sensor as each solid sees it
    length = np.sqrt(1 + up**2)
    inside = through_round if len(chosen) and solids.curved[chosen[0]].any() else through_box
    stretch = between_ends(ray, origin, solids, of)
    near, far, facing = inside(stretch, ray, origin, solids, of)
    hit = np.flatnonzero((near <= far) & (near > 0))
    return Hits(near[hit], facing[hit] / length[hit], of[hit], beam[hit] * len(scan.cos) + azimuth[hit])


def to_local(solids: Solids, points: Floats) -> Floats:
    """(S, 3) in lidar axes -> (S, 3) along, across and above each solid, about the same origin."""
    cos, sin = np.cos(solids.heading), np.sin(solids.heading)
    x, y, z = points.T
    return np.stack([x * cos + y * sin, y * cos - x * sin, z], axis=-1)


def between_ends(ray: Floats, origin: Floats, solids: Solids, of: Ints) -> Stretch:
    """The stretch of rays (3, P) between the floor and the ceiling of their solids `of` (P,)."""
    whole = Stretch(np.full(len(of), -np.inf), np.full(len(of), np.inf), np.zeros(len(of)))
    below_top = whole.behind(ray[2], (solids.half[:, 2] - origin[:, 2])[of])
    return below_top.behind(-ray[2], (solids.half[:, 2] + origin[:, 2])[of])


def through_box(stretch: Stretch, ray: Floats, origin: Floats, solids: Solids, of: Ints) -> Stretch:
    """The stretch that is also behind the four sides, which lean inwards by `taper`."""
    for axis in (0, 1):
        lean = solids.taper[:, axis]
        norm = 1 / np.sqrt(1 + lean**2)
        rise = (lean * norm)[of] * ray[2]
        rate = norm[of] * ray[axis]
        room = solids.half[:, axis] - lean * origin[:, 2]
        stretch = stretch.behind(rise + rate, ((room - origin[:, axis]) * norm)[of])
        stretch = stretch.behind(rise - rate, ((room + origin[:, axis]) * norm)[of])
    return stretch


def through_round(stretch: Stretch, ray: Floats, origin: Floats, solids: Solids, of: Ints) -> Stretch:
    """The stretch that is also within the ellipse or the ellipsoid: a t^2 + 2 b t + c <= 0."""
    curved = solids.curved[of].T  # (3, P)
    a = (curved * ray**2).sum(0)
    b = (ray * (solids.curved * origin)[of].T).sum(0)
    c = (solids.curved * origin**2).sum(1)[of] - 1
    under = b**2 - a * c
    root = np.sqrt(np.maximum(under, 0))
    t = np.where(under > 0, (-b - root) / a, np.inf)
    gradient = curved * (origin[of].T + np.where(under > 0, t, 0) * ray)
    side = root / np.sqrt((gradient**2).sum(0) + LEVEL)
    later = t > stretch.near
    far = np.minimum(stretch.far, (-b + root) / a)
    return Stretch(np.where(later, t, stretch.near), far, np.where(later, side, stretch.facing))


def candidates(scan: Scan, solids: Solids, chosen: Ints) -> tuple[Ints, Ints, Ints]:
    """Pairs (P,) of a row of `chosen`, a beam and an azimuth: the rays that its solid's span allows to meet it."""
    azimuth, num_azimuths, beam, num_beams = spans(scan, solids.only(chosen))
    line, up = counted(num_beams)  # a line: one beam's rays over one solid
    pair, right = counted(num_azimuths[line])
    row = line[pair]
    step = (azimuth[row] + right) % scan.per_turn
    beams = (beam[line] + up)[pair]
    if len(scan.cos) == scan.per_turn:
        return row, beams, step
    inside = np.flatnonzero(step < len(scan.cos))
    return row[inside], beams[inside], step[inside]


def counted(counts: Ints) -> tuple[Ints, Ints]:
    """Each index as often as counted, and 0, 1, 2 ... within each: [2, 3] -> [0 0 1 1 1], [0 1 0 1 2]."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)


def spans(scan: Scan, solids: Solids) -> tuple[Ints, Ints, Ints, Ints]:
    """First azimuth and number of azimuths, first beam and number of beams that can meet each solid, (S,) each.

    The sensor must stand outside of every footprint.
    """
    reach = solids.half[:, :2] + np.abs(solids.taper) * solids.half[:, 2:]  # at the wider end
    signs = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    along, across = np.moveaxis(signs * reach[:, None], -1, 0)  # (S, 4), of the footprint's corners
    cos, sin = np.cos(solids.heading)[:, None], np.sin(solids.heading)[:, None]
    x = solids.centre[:, :1] + along * cos - across * sin
    y = solids.centre[:, 1:2] + along * sin + across * cos
    middle = np.arctan2(solids.centre[:, 1], solids.centre[:, 0])
    aside = wrapped(np.arctan2(y, x) - middle[:, None])
    first = np.ceil((middle + aside.min(1) - scan.first_rad) / scan.step_rad)
    last = np.floor((middle + aside.max(1) - scan.first_rad) / scan.step_rad)
    outside = np.maximum(np.abs(to_local(solids, solids.centre)[:, :2]) - reach, 0)
    distances = np.stack([np.hypot(*outside.T), np.hypot(x, y).max(1)], axis=-1)  # (S, 2), nearest and farthest
    low = ((solids.centre[:, 2] - solids.half[:, 2])[:, None] / distances).min(1)
    high = ((solids.centre[:, 2] + solids.half[:, 2])[:, None] / distances).max(1)
    beam = np.searchsorted(scan.tan, low, side="left")
    num_beams = np.searchsorted(scan.tan, high, side="right") - beam
    return first.astype(np.int64), np.maximum(last - first + 1, 0).astype(np.int64), beam, num_beams
