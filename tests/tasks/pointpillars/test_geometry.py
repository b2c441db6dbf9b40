"""Overlaps against an exact polygon clipper (Sutherland and Hodgman's), and suppression against its definition."""

import itertools
import math

import numpy as np
import pytest
import torch

from raytrain.tasks.pointpillars import geometry
from raytrain.tasks.pointpillars.frames import corners

DTYPES = [torch.float32, torch.float64]


def clipped(subject, window):
    """What of the polygon `subject` lies within the convex, counter-clockwise polygon `window`; lists of (x, y)."""
    for (ax, ay), (bx, by) in itertools.pairwise([*window, window[0]]):
        side = [(bx - ax) * (y - ay) - (by - ay) * (x - ax) for x, y in subject]
        inside = []
        for i, (x, y) in enumerate(subject):
            before = i - 1
            if (side[i] >= 0) != (side[before] >= 0):
                t = side[before] / (side[before] - side[i])
                px, py = subject[before]
                inside.append((px + t * (x - px), py + t * (y - py)))
            if side[i] >= 0:
                inside.append((x, y))
        subject = inside
    return subject


def exact_overlap(a, b):
    """(N, M) m^2, box by box."""
    outlines = [[[tuple(corner) for corner in box[:4, :2]] for box in corners(boxes)] for boxes in (a, b)]
    shared = np.zeros((len(a), len(b)))
    for (i, one), (j, other) in itertools.product(*map(enumerate, outlines)):
        if not a[i, 3:5].all() or not b[j, 3:5].all():
            continue  # no outline to clip against
        x, y = np.array(clipped(one, other) or [(0.0, 0.0)]).T
        shared[i, j] = abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    return shared


def exact_ious(a, b):
    """IoU seen from above and of the volumes, (N, M) each."""
    shared = exact_overlap(a, b)
    area_a, area_b = a[:, 3] * a[:, 4], b[:, 3] * b[:, 4]
    top = np.minimum((a[:, 2] + a[:, 5] / 2)[:, None], b[:, 2] + b[:, 5] / 2)
    tall = np.maximum(top - np.maximum((a[:, 2] - a[:, 5] / 2)[:, None], b[:, 2] - b[:, 5] / 2), 0)
    bev = area_a[:, None] + area_b - shared
    volume = (area_a * a[:, 5])[:, None] + area_b * b[:, 5] - shared * tall
    with np.errstate(invalid="ignore"):
        return [np.nan_to_num(part / whole) for part, whole in ((shared, bev), (shared * tall, volume))]


def random_boxes(seed, count, around=(40.0, -10.0), spread=3.0):
    random = np.random.default_rng(seed)
    centres = np.column_stack([random.normal(around, spread, (count, 2)), random.normal(0, 1, count)])
    return np.column_stack([centres, random.uniform(0.2, 6, (count, 3)), random.uniform(-7, 7, count)])


def special_boxes():
    """Touching, contained, identical, turned by right angles, and without width or area."""
    return np.array(
        [
            [20, 5, 0, 4, 2, 1.5, 0],
            [20, 5, 0, 4, 2, 1.5, 0],  # identical
            [20, 5, 0, 4, 2, 1.5, math.pi],  # identical, the other way round
            [20, 5, 0, 2, 4, 1.5, math.pi / 2],  # identical, described otherwise
            [20, 5, 0, 4, 2, 1.5, math.pi / 2],  # a cross
            [20, 5, 0, 4, 2, 1.5, math.pi / 4],
            [20, 5, 0, 4, 2, 1.5, 1e-7],  # identical but for rounding
            [24, 5, 0, 4, 2, 1.5, 0],  # shares an edge
            [24, 7, 0, 4, 2, 1.5, 0],  # shares a corner
            [20, 7, 0, 4, 2, 1.5, 0],  # shares the long edge
            [20, 5, 1.5, 4, 2, 1.5, 0],  # stands on top
            [20, 5, 0, 1, 0.5, 0.5, 0.3],  # contained
            [19, 5, 0, 2, 2, 1.5, 0],  # contained, with three edges in common
            [20, 5, 0, 40, 20, 5, -0.9],  # contains all
            [20, 5, 0, 4, 0, 1.5, 0.4],  # a line
            [20, 5, 0, 0, 2, 1.5, 0],
            [20, 5, 0, 0, 0, 0, 1],  # a point
            [20, 5, 0, 4, 2, 0, 0],  # flat
            [60, -30, 0, 4, 2, 1.5, 0],  # far off
        ],
        dtype=np.float64,
    )


def as_seen_by(dtype, boxes):
    """The boxes as tensors of that type, and in float64 after its rounding."""
    tensor = torch.from_numpy(boxes).to(dtype)
    return tensor, tensor.double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boxes", [random_boxes(0, 60), random_boxes(1, 60, spread=0.5), special_boxes()])
def test_overlap_and_iou_equal_exact_clipping(boxes, dtype):
    ours, rounded = as_seen_by(dtype, boxes)
    bev, volume = exact_ious(rounded, rounded)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(geometry.overlap_bev(ours, ours), exact_overlap(rounded, rounded), 1e-5, tolerance)
    np.testing.assert_allclose(geometry.iou_bev(ours, ours), bev, rtol=0, atol=tolerance)
    np.testing.assert_allclose(geometry.iou_3d(ours, ours), volume, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_boxes_that_only_touch_share_nothing_and_identical_ones_everything(dtype):
    boxes, _ = as_seen_by(dtype, special_boxes())
    overlap, iou = geometry.overlap_bev(boxes, boxes), geometry.iou_3d(boxes, boxes)
    assert overlap[0, 7:10].max() < 1e-5
    assert (iou[0, :4] - 1).abs().max() < 1e-5
    assert iou.max() <= 1
    assert (overlap[14:17] == 0).all() and (overlap[:, 14:17] == 0).all()
    assert iou[16, 16] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearly_parallel_boxes_lose_no_accuracy(dtype):
    random = np.random.default_rng(3)
    boxes = np.repeat(random_boxes(4, 30, spread=20), 2, axis=0)
    boxes[1::2, :7] += random.choice([0, 1e-7, 1e-5, 1e-3], (30, 7))
    ours, rounded = as_seen_by(dtype, boxes)
    bev, volume = (iou.diagonal() for iou in exact_ious(rounded[::2], rounded[1::2]))
    np.testing.assert_allclose(geometry.iou_bev_paired(ours[::2], ours[1::2]), bev, rtol=0, atol=1e-5)
    np.testing.assert_allclose(geometry.iou_3d_paired(ours[::2], ours[1::2]), volume, rtol=0, atol=1e-5)


def test_boxes_of_centimetres_keep_their_accuracy_far_from_the_origin():
    boxes = random_boxes(8, 60, around=(70, -40), spread=0.02)
    boxes[:, 3:6] /= 60
    boxes[:, 2] = boxes[:, 2] / 60 - 1.5
    ours, rounded = as_seen_by(torch.float32, boxes)
    bev, volume = exact_ious(rounded, rounded)
    assert (volume > 0.1).sum() > 100
    np.testing.assert_allclose(geometry.iou_bev(ours, ours), bev, rtol=0, atol=1e-5)
    np.testing.assert_allclose(geometry.iou_3d(ours, ours), volume, rtol=0, atol=1e-5)


def test_overlap_does_not_depend_on_how_many_pairs_are_asked_at_once():
    boxes = torch.from_numpy(random_boxes(5, 200, spread=1))
    pairs = boxes.repeat(100, 1), boxes.flip(0).repeat(100, 1)
    assert len(pairs[0]) > geometry.CHUNK
    together = geometry.overlap_paired(*pairs)
    assert torch.equal(together, geometry.overlap_paired(boxes, boxes.flip(0)).repeat(100))


def test_no_boxes_have_no_overlaps():
    none, some = torch.zeros(0, 7), torch.ones(3, 7)
    assert geometry.iou_bev(none, some).shape == (0, 3)
    assert geometry.iou_3d(some, none).shape == (3, 0)
    assert geometry.nms(none, torch.zeros(0), 0.1).shape == (0,)


def test_limit_period_keeps_angles_within_its_period():
    angle = torch.tensor([-7.0, -math.pi / 2, 0.0, 1.0, 4.0])
    folded = geometry.limit_period(angle)
    assert folded.min() >= -math.pi / 2 - 1e-6 and folded.max() < math.pi / 2
    turns = (angle - folded) / math.pi
    assert torch.allclose(turns, turns.round(), atol=1e-6)
    assert torch.allclose(geometry.limit_period(torch.tensor([-1.0]), 0, 2 * math.pi), torch.tensor(2 * math.pi - 1))


def test_nearest_bev_swaps_the_sides_of_a_box_that_stands_across():
    boxes = torch.tensor([[10.0, 4, 0, 4, 2, 1.5, 0.7], [10, 4, 0, 4, 2, 1.5, 0.8], [10, 4, 0, 4, 2, 1.5, -3.1]])
    lengthwise, across = [8.0, 3, 12, 5], [9.0, 2, 11, 6]
    assert geometry.nearest_bev(boxes).tolist() == [lengthwise, across, lengthwise]
    assert geometry.nearest_bev(boxes[None].expand(2, 3, 7)).shape == (2, 3, 4)


def test_iou_of_rectangles_broadcasts_over_a_batch():
    one = torch.tensor([[[0.0, 0, 2, 2], [5, 5, 6, 6]]])
    many = torch.tensor([[[1.0, 0, 3, 2], [0, 0, 2, 2]], [[0, 0, 0, 0], [5, 5, 6, 7]]])
    expected = torch.tensor([[[1 / 3, 1], [0, 0]], [[0, 0], [0, 0.5]]])
    assert torch.allclose(geometry.iou_axis_aligned(one, many), expected)


def kept_by_definition(boxes, scores, threshold):
    over = (geometry.iou_bev(boxes, boxes) > threshold).numpy()
    kept = []
    for row in scores.argsort(descending=True, stable=True).tolist():
        if not over[row, kept].any():
            kept.append(row)
    return kept


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.7])
@pytest.mark.parametrize("spread", [2, 30])
def test_nms_keeps_what_its_definition_keeps(spread, threshold):
    boxes = torch.from_numpy(random_boxes(6, 700, spread=spread)).float()
    scores = torch.from_numpy(np.random.default_rng(7).integers(0, 200, 700) / 200)  # ties: the first row goes first
    kept = kept_by_definition(boxes, scores, threshold)
    assert len(kept) > 1
    assert geometry.nms(boxes, scores, threshold, post_max=700).tolist() == kept
    assert geometry.nms(boxes, scores, threshold, post_max=5).tolist() == kept[:5]


def test_nms_lets_only_the_best_take_part():
    boxes = torch.tensor([[100.0 * i, 0, 0, 4, 2, 1, 0] for i in range(6)])
    assert geometry.nms(boxes, torch.tensor([0.1, 0.6, 0.3, 0.5, 0.2, 0.4]), 0.1, pre_max=3).tolist() == [1, 3, 5]
