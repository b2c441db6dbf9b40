"""KITTI's evaluation: against OpenPCDet's numbers, against a plain loop over the protocol, and by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raytrain.errors import ConfigError, DataError
from raytrain.tasks.pointpillars import geometry
from raytrain.tasks.pointpillars.frames import Annotations
from raytrain.tasks.pointpillars.kitti_eval import DIFFICULTIES, LOOSE, STRICT, evaluate, warnings_of

GOLDEN = Path(__file__).parents[2] / "golden" / "kitti_eval"
CLASSES = ["Car", "Pedestrian", "Cyclist"]


def golden_frames():
    """Labels and detections of the 20 frames."""
    arrays = np.load(GOLDEN / "annos.npz")
    columns = ["name", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y"]
    sides = []
    for side, names in (("gt", columns), ("dt", [*columns, "score"])):
        cuts = np.cumsum(arrays[f"{side}_num"])[:-1]
        pieces = [np.split(arrays[f"{side}_{name}"], cuts) for name in names]
        sides.append([Annotations(*frame) for frame in zip(*pieces, strict=True)])
    return sides


def test_average_precision_equals_openpcdets():
    results = evaluate(*golden_frames(), CLASSES)
    expected = json.loads((GOLDEN / "result.json").read_text())["AP_R40_3d easy, moderate, hard (percent)"]
    assert len(expected) == 6
    for key, values in expected.items():
        name, overlap = key.split()[0], float(key.split()[-1])
        suffix = "" if overlap == STRICT[name] else "_loose"
        ours = [results[f"{name}_3d/{difficulty.name}{suffix}_R40"] for difficulty in DIFFICULTIES]
        assert ours == pytest.approx(values, abs=1e-3), key


def cars(count, name="Car", scores=None):
    """That many objects in one frame, well apart, easy to see."""
    column = np.arange(count, dtype=np.float64)
    zeros = np.zeros(count)
    bbox = np.column_stack([100 * column, zeros + 100, 100 * column + 80, zeros + 160])
    location = np.column_stack([10 * column, zeros + 1.6, zeros + 20])
    names = np.full(count, name)
    size = np.tile([3.9, 1.5, 1.6], (count, 1))
    return Annotations(names, zeros, zeros, zeros, bbox, size, location, zeros, scores)


def joined(*some):
    """Labels one after the other."""
    names = [field.name for field in dataclasses.fields(Annotations) if field.name != "scores"]
    return Annotations(*(np.concatenate([getattr(one, name) for one in some]) for name in names))


def change(annotations, **columns):
    return dataclasses.replace(annotations, **columns)


def scored(annotations, *scores):
    return change(annotations, scores=np.array(scores, dtype=np.float64))


def test_perfect_detections_of_41_labels_have_100_percent():
    truth = cars(41)
    results = evaluate([truth], [change(truth, scores=np.linspace(0.9, 0.1, 41))], ["Car"])
    assert len(results) == 3 * 2 * 6
    assert set(results.values()) == {100.0}
    assert warnings_of([truth], ["Car"]) == []


def test_fewer_than_41_labels_cannot_reach_100_percent_and_are_warned_of():
    truth = cars(9)
    results = evaluate([truth], [scored(truth, *np.linspace(0.9, 0.1, 9))], ["Car"])
    assert results["Car_3d/easy_R40"] == pytest.approx(100 * 8 / 40)
    [line] = warnings_of([truth], ["Car"])
    assert "Car" in line and "9 easy (at most 20 %)" in line and "R11" in line


def test_a_detection_turned_round_has_no_orientation_but_all_else():
    truth = cars(41)
    back = change(truth, alpha=truth.alpha + np.pi, rotation_y=truth.rotation_y + np.pi, scores=np.ones(41))
    results = evaluate([truth], [back], ["Car"])
    assert results["Car_aos/easy_R40"] == pytest.approx(0)
    assert results["Car_image/easy_R40"] == results["Car_3d/easy_R40"]


def test_false_detections_cost_precision_unless_low_or_in_a_dont_care_region():
    truth = cars(1)
    region = change(cars(2, "DontCare").only(np.array([False, True])), location=np.full((1, 3), -1000.0))
    found = scored(cars(2), 0.5, 0.9)  # the second lies in the region
    low = change(found, bbox=found.bbox - [[0, 0, 0, 0], [0, 0, 0, 36]])
    first = {}
    for key, labels, detections in [
        ("plain", truth, found),
        ("dont care", joined(truth, region), found),
        ("low", truth, low),
    ]:
        results = evaluate([labels], [detections], ["Car"])
        first[key] = [11 * results[f"Car_{measure}/easy_R11"] for measure in ("image", "bev", "3d")]
    assert first["plain"] == pytest.approx([50, 50, 50])
    assert first["dont care"] == pytest.approx([100, 50, 50])
    assert first["low"] == pytest.approx([100, 100, 100])


def test_a_van_may_be_taken_for_a_car_and_a_truck_may_not():
    found = scored(cars(2), 0.5, 0.9)
    values = []
    for other in ("Van", "Truck"):
        truth = change(cars(2), names=np.array(["Car", other]))
        values.append(11 * evaluate([truth], [found], ["Car"])["Car_3d/easy_R11"])
    assert values == pytest.approx([100, 50])


def test_labels_beyond_a_difficulty_are_neither_missed_nor_demanded():
    truth = change(cars(2), occluded=np.array([0.0, 2.0]))
    results = evaluate([truth], [scored(cars(2), 0.5, 0.9)], ["Car"])
    assert 11 * results["Car_3d/easy_R11"] == pytest.approx(100)
    assert warnings_of([truth], ["Car"])[0].startswith("Car: too few labels")
    assert "1 easy (at most 0 %), 1 moderate (at most 0 %), 2 hard (at most 2.5 %)" in warnings_of([truth], ["Car"])[0]


def test_a_label_must_exceed_the_least_height_and_a_detection_only_reach_it():
    truth, found = cars(2), scored(cars(2), 0.9, 0.9)
    truth.bbox[0, 3] = truth.bbox[0, 1] + 40  # pixels: not easy any more
    found.bbox[1, 3] = found.bbox[1, 1] + 40  # and still demanded
    assert "1 easy" in warnings_of([truth], ["Car"])[0]
    assert 11 * evaluate([truth], [found], ["Car"])["Car_3d/easy_R11"] == pytest.approx(100)


def test_mistaken_inputs_are_refused_by_name():
    with pytest.raises(ConfigError, match="Tram"):
        evaluate([cars(1)], [cars(1)], ["Car", "Tram"])
    with pytest.raises(DataError, match="2 frames of labels and 1 of detections"):
        evaluate([cars(1)] * 2, [cars(1)], ["Car"])
    with pytest.raises(DataError, match="no scores"):
        evaluate([cars(1)], [cars(1)], ["Car"])


def test_nothing_labelled_or_found_has_0_percent():
    none = cars(0)
    for labels, detections in ([[], []], [[none], [none]], [[cars(3)], [none]], [[none], [scored(cars(2), 1, 1)]]):
        assert set(evaluate(labels, detections, CLASSES).values()) == {0.0}


def random_frame(random, count, detections):
    """A crowd: boxes near each other, of all classes and heights; detections are shaken copies and strays."""
    names = np.array([*STRICT, "DontCare", "Car", "Car", "Pedestrian", "Cyclist"])[random.integers(0, 11, count)]
    corner = random.uniform(0, 60, (count, 2))
    truth = Annotations(
        names,
        random.choice([0, 0, 0.2, 0.4], count),
        random.choice([0.0, 0, 1, 2, 3], count),
        random.uniform(-3, 3, count),
        np.hstack([corner, corner + random.uniform(10, 80, (count, 2))]),
        random.uniform(2, 4, (count, 3)),
        random.uniform([-2, 1, 10], [2, 1.5, 14], (count, 3)),
        random.uniform(-3, 3, count),
    )
    origin = random.integers(0, max(count, 1), detections if count else 0)
    found = truth.only(origin)
    shaken = {
        name: getattr(found, name) + random.normal(0, scale, getattr(found, name).shape)
        for name, scale in (("bbox", 4), ("location", 0.1), ("rotation_y", 0.1), ("alpha", 0.5))
    }
    classes = np.where(random.random(len(found)) < 0.2, "Cyclist", found.names)
    return truth, change(found, names=classes, scores=random.integers(1, 40, len(found)) / 40, **shaken)


def image_overlap(a, b, over_a_alone=False):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (area_a if over_a_alone else area_a + area_b - width * height)


def overlaps_of(truth, found, measure):
    """(M, D), plainly."""
    if measure == "image":
        rows = [[image_overlap(a, b) for b in found.bbox] for a in truth.bbox]
        return np.reshape(rows, (len(truth), len(found)))
    boxes = []
    for some in (truth, found):
        x, y, z = some.location.T
        length, height, width = some.dimensions.T
        boxes.append(torch.from_numpy(np.column_stack([x, z, height / 2 - y, length, width, height, -some.rotation_y])))
    return (geometry.iou_bev if measure == "bev" else geometry.iou_3d)(*boxes).numpy()


def role_of_truth(truth, row, name, limits):
    own = truth.names[row] == name
    if not own and truth.names[row] != {"Car": "Van", "Pedestrian": "Person_sitting"}.get(name):
        return "foreign"
    seen = truth.occluded[row] <= limits.occluded and truth.truncated[row] <= limits.truncated
    return "counts" if own and seen and truth.bbox[row, 3] - truth.bbox[row, 1] > limits.height else "ignored"


def role_of_detection(found, row, name, limits):
    if found.bbox[row, 3] - found.bbox[row, 1] < limits.height:
        return "ignored"
    return "counts" if found.names[row] == name else "foreign"


def match_frame(frame, least, threshold=None):
    """(truth, detection) pairs that count, and the detections left over, ground truth by ground truth."""
    overlap, truth_roles, found_roles, scores = frame
    free = {
        j for j, role in enumerate(found_roles) if role != "foreign" and (threshold is None or scores[j] >= threshold)
    }
    hits = []
    for i, role in enumerate(truth_roles):
        close = [j for j in sorted(free) if overlap[i, j] > least] if role != "foreign" else []
        if not close:
            continue
        counting = [j for j in close if found_roles[j] == "counts"]
        if threshold is None:
            best = max(close, key=lambda j: scores[j])
        else:
            best = max(counting, key=lambda j: overlap[i, j]) if counting else close[0]
        free.remove(best)
        if role == "counts" and found_roles[best] == "counts":
            hits.append((i, best))
    return hits, [j for j in free if found_roles[j] == "counts"]


def plain_precision(labels, detections, name, measure, limits, least):
    """The running maximum of precision and of orientation, by loops over frames and thresholds."""
    frames = []
    for truth, found in zip(labels, detections, strict=True):
        truth_roles = [role_of_truth(truth, i, name, limits) for i in range(len(truth))]
        found_roles = [role_of_detection(found, j, name, limits) for j in range(len(found))]
        frames.append((overlaps_of(truth, found, measure), truth_roles, found_roles, found.scores))
    scores = sorted((frame[3][j] for frame in frames for _, j in match_frame(frame, least)[0]), reverse=True)
    num_labels = sum(frame[1].count("counts") for frame in frames)
    curve, wanted = [], 0.0
    for rank, score in enumerate(scores):
        here, later = (rank + 1) / num_labels, (rank + 2) / num_labels
        if rank + 1 < len(scores) and later - wanted < wanted - here:
            continue
        wanted += 1 / 40
        right, wrong, alike = 0, 0, 0.0
        for truth, found, frame in zip(labels, detections, frames, strict=True):
            hits, left = match_frame(frame, least, score)
            right += len(hits)
            alike += sum((1 + np.cos(truth.alpha[i] - found.alpha[j])) / 2 for i, j in hits)
            regions = truth.bbox[truth.names == "DontCare"] if measure == "image" else []
            wrong += sum(not any(image_overlap(found.bbox[j], r, True) > least for r in regions) for j in left)
        curve.append((right / max(right + wrong, 1), alike / max(right + wrong, 1)))
    full = np.zeros((41, 2))
    full[: len(curve)] = np.reshape(curve, (-1, 2))
    return np.array([full[i:].max(0) for i in range(41)]).T


def test_all_frames_at_once_give_what_a_plain_loop_gives():
    random = np.random.default_rng(11)
    frames = [random_frame(random, count, 2 * count) for count in (12, 0, 25, 7, 30, 40, 40, 3, 40)]
    labels, detections = ([frame[side] for frame in frames] for side in (0, 1))
    results = evaluate(labels, detections, CLASSES)
    some = 0
    for name in CLASSES:
        for limits in DIFFICULTIES:
            for measure, suffix, least in [
                ("image", "", STRICT[name]),
                ("bev", "", STRICT[name]),
                ("3d", "_loose", LOOSE[name]),
            ]:
                precision, orientation = plain_precision(labels, detections, name, measure, limits, least)
                curves = [(measure, precision)] + [("aos", orientation)] * (measure == "image")
                for key, curve in curves:
                    key = f"{name}_{key}/{limits.name}{suffix}"
                    assert results[f"{key}_R40"] == pytest.approx(100 * curve[1:].mean(), abs=1e-9), key
                    assert results[f"{key}_R11"] == pytest.approx(100 * curve[::4].mean(), abs=1e-9), key
                    some += results[f"{key}_R40"] > 0
    assert some > 30
