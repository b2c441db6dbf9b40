"""KITTI's object benchmark: average precision of detections in the image, from above, in space, and of orientation.

The protocol is the devkit's (Geiger et al., CVPR 2012), as OpenPCDet has it:
ground truths   of the class and within the difficulty's limits count; of the class beyond them, or of its neutral
                class (Van for Car, Person_sitting for Pedestrian), may be detected, or missed, without consequence
detections      lower in the image than the difficulty's least height have no consequence, whatever their class
matching        ground truth by ground truth in the label file's order, each detection once
thresholds      up to 41, at steps of 1/40 in recall, from the scores of the detections that match without threshold
precision       its running maximum from the right, averaged at 11 (R11) or at the upper 40 (R40) of those points
Every frame and every threshold is matched at once: one step takes the n-th ground truth of all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from raytrain.errors import ConfigError, DataError
from raytrain.tasks.pointpillars import geometry
from raytrain.tasks.pointpillars.frames import DIFFICULTIES, Annotations, Difficulty

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]

NUM_POINTS = 41  # of the precision-recall curve
STRICT = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5, "Van": 0.7, "Person_sitting": 0.5, "Truck": 0.7}
LOOSE = {"Car": 0.5, "Pedestrian": 0.25, "Cyclist": 0.25, "Van": 0.5, "Person_sitting": 0.25, "Truck": 0.5}
NEUTRAL = {"Car": "Van", "Pedestrian": "Person_sitting"}
COUNTS, IGNORED, FOREIGN = 0, 1, -1  # the role of an object for a class and difficulty
PAIRS_AT_ONCE = 1 << 20


def evaluate(
    labels: Sequence[Annotations], detections: Sequence[Annotations], class_names: Sequence[str]
) -> dict[str, float]:
    """Average precision in percent, by names such as Car_3d/moderate_R40.

    labels, detections: one entry a frame, in the same order. Measures: image, aos (orientation, matched in the image),
    bev and 3d; bev and 3d also as Car_3d/moderate_loose_R40, with the smaller of the two overlaps in use.
    A class without labels has 0.
    """
    _check_classes(class_names)
    _check_frames(labels, detections)
    truths, found = _concatenated(labels), _concatenated(detections)
    overlaps = _overlaps(truths, found)
    in_dont_care = _share_in_dont_care(truths, found)
    nowhere = np.zeros_like(in_dont_care)
    results: dict[str, float] = {}
    for name in class_names:
        for difficulty in DIFFICULTIES:
            roles = _truth_roles(truths, name, difficulty), _found_roles(found, name, difficulty)
            case = _Case(truths, found, *roles)
            precision, orientation = _curves(case, overlaps["image"], STRICT[name], in_dont_care)
            results |= _averages(f"{name}_image/{difficulty.name}", precision)
            results |= _averages(f"{name}_aos/{difficulty.name}", orientation)
            for measure in ("bev", "3d"):
                for suffix, least in (("", STRICT[name]), ("_loose", LOOSE[name])):
                    precision, _ = _curves(case, overlaps[measure], least, nowhere)
                    results |= _averages(f"{name}_{measure}/{difficulty.name}{suffix}", precision)
    return results


def warnings_of(labels: Sequence[Annotations], class_names: Sequence[str]) -> list[str]:
    """One line for each class with too few labels for 100 % in R40, which averages over 40 steps in recall."""
    _check_classes(class_names)
    truths = _concatenated(labels)
    lines = []
    for name in class_names:
        counts = {limits.name: int((_truth_roles(truths, name, limits) == COUNTS).sum()) for limits in DIFFICULTIES}
        few = [f"{n} {key} (at most {max(n - 1, 0) / 0.4:g} %)" for key, n in counts.items() if n < NUM_POINTS]
        if few:
            lines.append(
                f"{name}: too few labels for AP_R40 to reach 100 %, which takes {NUM_POINTS}: {', '.join(few)}; "
                "evaluate on more frames, or read R11"
            )
    return lines


class _Objects(NamedTuple):
    """The objects of all frames, one row each, in order of frames.

    frame: (M,) int64; names: (M,) lower case; boxes: (M, 7) seen from above the camera, x right, y forward, z up
    """

    frame: Integers
    names: NDArray[np.str_]
    bbox: Floats
    boxes: Floats
    alpha: Floats
    occluded: Floats
    truncated: Floats
    scores: Floats

    @property
    def height(self) -> Floats:
        """(M,) pixels."""
        return self.bbox[:, 3] - self.bbox[:, 1]


class _Overlaps(NamedTuple):
    """Pairs and what they overlap by, (P,) each, in order of truth, then detection."""

    truth: Integers
    detection: Integers
    value: Floats

    def only(self, chosen: Mask) -> _Overlaps:
        return _Overlaps(self.truth[chosen], self.detection[chosen], self.value[chosen])


class _Case(NamedTuple):
    """The objects and the role of each for one class and difficulty."""

    truths: _Objects
    found: _Objects
    truth_role: Integers
    found_role: Integers


def _check_classes(class_names: Sequence[str]) -> None:
    unknown = [name for name in class_names if name not in STRICT]
    if unknown:
        raise ConfigError(f"KITTI's benchmark has no class {unknown[0]}; it evaluates {', '.join(STRICT)}")


def _check_frames(labels: Sequence[Annotations], detections: Sequence[Annotations]) -> None:
    if len(labels) != len(detections):
        raise DataError(f"{len(labels)} frames of labels and {len(detections)} of detections; there must be one each")
    unscored = [frame for frame, some in enumerate(detections) if some.scores is None and len(some)]
    if unscored:
        raise DataError(f"The detections of frame {unscored[0]} (counted from 0) have no scores; are they labels?")


def _concatenated(frames: Sequence[Annotations]) -> _Objects:
    def column(name: str, *shape: int) -> Floats:
        empty = [np.zeros((0, *shape))]
        return np.concatenate(empty + [np.reshape(getattr(frame, name), (len(frame), *shape)) for frame in frames])

    length, height, width = column("dimensions", 3).T
    x, y, z = column("location", 3).T
    names = np.concatenate([np.zeros(0, dtype=np.str_)] + [np.asarray(frame.names, dtype=np.str_) for frame in frames])
    scores = [np.zeros(0)] + [np.zeros(len(some)) if some.scores is None else some.scores for some in frames]
    return _Objects(
        frame=np.repeat(np.arange(len(frames)), [len(frame) for frame in frames]),
        names=np.strings.lower(names),
        bbox=column("bbox", 4),
        boxes=np.column_stack([x, z, height / 2 - y, length, width, height, -column("rotation_y")]),
        alpha=column("alpha"),
        occluded=column("occluded"),
        truncated=column("truncated"),
        scores=np.concatenate(scores),
    )


def _pairs(a: Integers, b: Integers) -> Iterator[tuple[Integers, Integers]]:
    """Every row of a with every row of b of the same frame, in order, about a million pairs at a time.

    a: (N,), b: (M,): the frame of each row, ascending.
    """
    first, last = (np.searchsorted(b, a, side) for side in ("left", "right"))
    count = last - first
    for part in np.array_split(np.arange(len(a)), 1 + count.sum() // PAIRS_AT_ONCE):
        rows = np.repeat(part, count[part])
        yield rows, first[rows] + np.arange(len(rows)) - np.searchsorted(rows, rows)


def _overlaps(truths: _Objects, found: _Objects) -> dict[str, _Overlaps]:
    """The pairs of one frame that could match: their IoU in the image, from above and in space."""
    parts: dict[str, list[_Overlaps]] = {"image": [], "bev": [], "3d": []}
    true_boxes, found_boxes = torch.from_numpy(truths.boxes), torch.from_numpy(found.boxes)
    for truth, detection in _pairs(truths.frame, found.frame):
        shared, true_area, found_area = _pixels(truths.bbox[truth], found.bbox[detection])
        meet = shared > 0
        ious = shared[meet] / (true_area + found_area - shared)[meet]
        parts["image"].append(_Overlaps(truth[meet], detection[meet], ious))
        meet = geometry.circles_touch(true_boxes[truth], found_boxes[detection]).numpy()
        near = true_boxes[truth[meet]], found_boxes[detection[meet]]
        parts["bev"].append(_Overlaps(truth[meet], detection[meet], geometry.iou_bev_paired(*near).numpy()))
        parts["3d"].append(_Overlaps(truth[meet], detection[meet], geometry.iou_3d_paired(*near).numpy()))
    least = min(LOOSE.values())
    joined = {measure: _Overlaps(*map(np.concatenate, zip(*some, strict=True))) for measure, some in parts.items()}
    return {measure: pairs.only(pairs.value > least) for measure, pairs in joined.items()}


def _share_in_dont_care(truths: _Objects, found: _Objects) -> Floats:
    """(D,): the largest share of each detection's area in the image that one DontCare region covers."""
    regions = np.flatnonzero(truths.names == "dontcare")
    share = np.zeros(len(found.frame))
    for detection, region in _pairs(found.frame, truths.frame[regions]):
        shared, area, _ = _pixels(found.bbox[detection], truths.bbox[regions[region]])
        meet = shared > 0
        np.maximum.at(share, detection[meet], shared[meet] / area[meet])
    return share


def _pixels(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats]:
    """The area that rectangles (P, 4) share, and that of each, (P,)."""
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    return sides.clip(min=0).prod(1), (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)


def _truth_roles(truths: _Objects, name: str, limits: Difficulty) -> Integers:
    own, neutral = (truths.names == some.lower() for some in (name, NEUTRAL.get(name, "")))
    beyond = (truths.occluded > limits.occluded) | (truths.truncated > limits.truncated)
    beyond |= truths.height <= limits.height
    return np.where(own & ~beyond, COUNTS, np.where(own | neutral, IGNORED, FOREIGN))


def _found_roles(found: _Objects, name: str, limits: Difficulty) -> Integers:
    low = np.abs(found.height) < limits.height
    return np.where(low, IGNORED, np.where(found.names == name.lower(), COUNTS, FOREIGN))


def _curves(case: _Case, overlaps: _Overlaps, least: float, in_dont_care: Floats) -> tuple[Floats, Floats]:
    """Precision and orientation of one class, difficulty and measure at 41 points of recall.

    least: what a match must overlap by more than; in_dont_care: (D,), what each detection shares with such regions.
    """
    truth_role, found_role = case.truth_role[overlaps.truth], case.found_role[overlaps.detection]
    used = (overlaps.value > least) & (truth_role != FOREIGN) & (found_role != FOREIGN)
    pairs = overlaps.only(used)
    counts = (truth_role[used] == COUNTS) & (found_role[used] == COUNTS)  # (P,)
    scores = case.found.scores

    first = _match(case, pairs, scores[pairs.detection], np.array([-np.inf]))[0] & counts
    thresholds = _thresholds(scores[pairs.detection[first]], int((case.truth_role == COUNTS).sum()))  # (T,)

    preference = np.where(found_role[used] == IGNORED, 0, pairs.value)
    matched = _match(case, pairs, preference, thresholds)  # (T, P)
    at_stake = (case.found_role == COUNTS) & (in_dont_care <= least)
    reported = at_stake.sum() - np.searchsorted(np.sort(scores[at_stake]), thresholds)
    right = matched & counts
    made = np.maximum(right.sum(1) + reported - matched[:, at_stake[pairs.detection]].sum(1), 1)
    turned = case.truths.alpha[pairs.truth] - case.found.alpha[pairs.detection]
    return _envelope(right.sum(1) / made), _envelope(right @ ((1 + np.cos(turned)) / 2) / made)


def _match(case: _Case, pairs: _Overlaps, preference: Floats, thresholds: Floats) -> Mask:
    """Which pairs are matched: each truth in turn takes the free detection it prefers, the first of equals.

    preference: (P,); thresholds: (T,), the least scores of detections that take part.   Returns (T, P).
    """
    truth, start, count = np.unique(pairs.truth, return_index=True, return_counts=True)
    frame = case.truths.frame[truth]
    turn = np.arange(len(truth)) - np.searchsorted(frame, frame)  # truths of one frame come one after the other
    detections, column = np.unique(pairs.detection, return_inverse=True)
    free = case.found.scores[detections] >= thresholds[:, None]  # (T, those in pairs)
    matched = np.zeros((len(free), len(column)), dtype=np.bool_)
    for now in range(turn.max(initial=-1) + 1):
        rows = np.flatnonzero(turn == now)
        candidate = start[rows, None] + np.minimum(np.arange(count[rows].max()), count[rows, None] - 1)  # (G, C)
        worth = np.where(free[:, column[candidate]], preference[candidate], -np.inf)  # (T, G, C)
        best = worth.argmax(2)  # the last candidate fills the row up, and the first of equals is taken
        threshold, row = np.nonzero(worth.max(2) > -np.inf)
        taken = candidate[row, best[threshold, row]]
        matched[threshold, taken] = True
        free[threshold, column[taken]] = False
    return matched


def _thresholds(scores: Floats, num_labels: int) -> Floats:
    """The scores, highest first, at which recall comes nearest to 0, 1/40, 2/40 and so on."""
    descending = np.sort(scores)[::-1]
    chosen: list[float] = []
    recall = 0.0
    for rank, score in enumerate(descending):
        last = rank + 1 == len(descending)
        here, next_one = (rank + 1) / num_labels, (rank + 2) / num_labels
        if last or next_one - recall >= recall - here:
            chosen.append(score)
            recall += 1 / (NUM_POINTS - 1)
    return np.array(chosen[:NUM_POINTS])


def _envelope(curve: Floats) -> Floats:
    """(T,) -> (41,): the best at this recall or beyond, and 0 beyond the last."""
    full = np.zeros(NUM_POINTS)
    full[: len(curve)] = curve
    return np.maximum.accumulate(full[::-1])[::-1]


def _averages(name: str, curve: Floats) -> dict[str, float]:
    return {f"{name}_R11": 100 * float(curve[::4].mean()), f"{name}_R40": 100 * float(curve[1:].mean())}
