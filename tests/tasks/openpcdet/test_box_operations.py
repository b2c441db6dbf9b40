"""Operations on boxes and what lies in them, against their definitions, written out in numpy."""

import numpy as np
import pytest
import torch
from point_sets import Kernel, boxes_round, point_sets

from raytrain.tasks.openpcdet.ops import iou3d_nms_cuda as iou
from raytrain.tasks.openpcdet.ops import neighbours
from raytrain.tasks.openpcdet.ops import roiaware_pool3d_cuda as roiaware
from raytrain.tasks.openpcdet.ops import roipoint_pool3d_cuda as roipoint
from raytrain.tasks.pointpillars import geometry

SETS = point_sets(90, 8)
every_set = pytest.mark.parametrize("points", [points for points, _ in SETS.values()], ids=SETS)


@pytest.fixture(params=["in one go", "in small chunks"], autouse=True)
def _chunks(request, monkeypatch):
    if request.param == "in small chunks":
        monkeypatch.setattr(neighbours, "PAIRS", 100)


def in_box(points, box, margin):
    """(N,) whether each point is in a box, and (N, 3) where in its frame."""
    away = points.numpy() - box[:3].numpy()
    cos, sin = box[6].cos().numpy(), box[6].sin().numpy()
    local = np.column_stack([away[:, 0] * cos + away[:, 1] * sin, away[:, 1] * cos - away[:, 0] * sin, away[:, 2]])
    half = box[3:6].numpy() / 2
    side = np.abs(local[:, :2]) < half[:2] + np.float32(margin)
    return side.all(1) & (np.abs(local[:, 2]) <= half[2]), local


@every_set
def test_points_are_found_in_the_boxes_that_hold_them(points):
    boxes = boxes_round(points, 12)
    index = torch.full((1, len(points)), -1, dtype=torch.int32)
    roiaware.points_in_boxes_gpu(boxes[None], points[None], index)
    holds = np.array([in_box(points, box, 1e-5)[0] for box in boxes])
    wanted = np.where(holds.any(0), holds.argmax(0), -1) if len(points) else np.zeros(0)
    assert (index[0].numpy() == wanted).all()

    every = torch.full((12, len(points)), 9, dtype=torch.int32)
    roiaware.points_in_boxes_cpu(boxes, points, every)
    assert (every.numpy() == [in_box(points, box, 1e-2)[0] for box in boxes]).all()


def test_a_point_on_a_face_is_in_the_box_and_one_beyond_it_is_not():
    box = torch.tensor([[10, 20, 1, 2, 4, 2, 0]]).float()
    on = torch.tensor([[11, 20, 1], [10, 22, 1], [10, 20, 2], [10, 20, 0], [9, 18, 0]]).float()
    beyond = torch.tensor([[11.001, 20, 1], [10, 22.001, 1], [10, 20, 2.001], [10, 20, -0.001]])
    index = torch.full((2, 5), -1, dtype=torch.int32)
    roiaware.points_in_boxes_gpu(box[None].repeat(2, 1, 1), torch.stack([on, torch.cat([beyond, beyond[:1]])]), index)
    assert index.tolist() == [[0] * 5, [-1] * 5]
    roiaware.points_in_boxes_gpu(box[None, :0].repeat(2, 1, 1), torch.stack([on, on]), index.fill_(-1))
    assert (index == -1).all()


@every_set
@pytest.mark.parametrize("num_sampled", [1, 7, 200])
def test_as_many_points_of_each_box_are_pooled_repeated_where_there_are_fewer(points, num_sampled):
    boxes = boxes_round(points, 6)
    features = torch.arange(2 * len(points)).view(-1, 2).float()
    pooled, empty = torch.full((1, 6, num_sampled, 5), 3.0), torch.zeros(1, 6, dtype=torch.int32)
    roipoint.forward(points[None], boxes[None], features[None], pooled, empty)
    for row, box in enumerate(boxes):
        inside = in_box(points, box, 1e-5)[0].nonzero()[0][:num_sampled]
        assert empty[0, row] == (len(inside) == 0)
        if len(inside):
            chosen = np.resize(inside, num_sampled)
            assert torch.equal(pooled[0, row], torch.cat([points[chosen], features[chosen]], dim=1))
        else:
            assert (pooled[0, row] == 3).all()


def pooled_by_hand(boxes, points, features, cells, size, method):
    """pooled (N, *cells, C), argmax and members (N, *cells, size), voxel by voxel."""
    pooled = np.zeros((len(boxes), *cells, features.shape[1]), dtype=features.numpy().dtype)
    best = np.full(pooled.shape, -1)
    members = np.zeros((len(boxes), *cells, size), dtype=int)
    for n, box in enumerate(boxes):
        inside, local = in_box(points, box, 1e-5)
        for k in inside.nonzero()[0]:
            whole = box[3:6].numpy()
            with np.errstate(all="ignore"):
                at = np.nan_to_num((local[k] + whole / 2) / (whole / np.float32(cells))).astype(int)
            list_of = members[(n, *np.clip(at, 0, np.array(cells) - 1))]
            if list_of[0] < size - 1:
                list_of[0] += 1
                list_of[list_of[0]] = k
    for at in np.argwhere(members[..., 0]):
        chosen = members[tuple(at)][1 : members[tuple(at)][0] + 1]
        values = features.numpy()[chosen]
        if method == roiaware.AVG:
            pooled[tuple(at)] = values.mean(0)
            continue
        pooled[tuple(at)], best[tuple(at)] = values.max(0), chosen[values.argmax(0)]
    return pooled, best, members


@every_set
@pytest.mark.parametrize("method", [roiaware.MAX, roiaware.AVG])
def test_features_are_pooled_in_each_cell_of_each_box(points, method):
    boxes, cells, size = boxes_round(points, 5), (3, 2, 4), 4
    features = torch.randn(len(points), 6, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with ties
    pooled = torch.zeros(5, *cells, 6)
    best, members = torch.zeros(5, *cells, 6, dtype=torch.int32), torch.zeros(5, *cells, size, dtype=torch.int32)
    roiaware.forward(boxes, points, features, best, members, pooled, method)
    wanted, wanted_best, wanted_members = pooled_by_hand(boxes, points, features, cells, size, method)
    assert (members.numpy() == wanted_members).all()
    np.testing.assert_allclose(pooled.numpy(), wanted, atol=1e-6)
    if method == roiaware.MAX:
        assert (best.numpy() == wanted_best).all()


@pytest.mark.parametrize("method", [roiaware.MAX, roiaware.AVG])
def test_the_gradient_of_roi_aware_pooling_is_its_derivative(method):
    points = SETS["scattered"][0][:30].double()
    boxes = boxes_round(points, 3).double()
    best, members = torch.zeros(3, 2, 2, 2, 2, dtype=torch.int32), torch.zeros(3, 2, 2, 2, 5, dtype=torch.int32)

    def forward(features):
        pooled = features.new_zeros(3, 2, 2, 2, 2)
        roiaware.forward(boxes, points, features, best, members.zero_(), pooled, method)
        return pooled

    def backward(grad):
        into = grad.new_zeros(len(points), 2)
        roiaware.backward(members, best, grad, into, method)
        return into

    features = torch.randn(len(points), 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: Kernel.apply(x, forward, backward), (features,))


def test_overlaps_are_geometrys_and_of_pairs_the_diagonal():
    a, b = boxes_round(SETS["scattered"][0], 20, 1), boxes_round(SETS["scattered"][0], 20, 2)
    shared, ious, paired, paired_ious = torch.empty(20, 20), torch.empty(20, 20), torch.empty(20, 1), torch.empty(20, 1)
    iou.boxes_overlap_bev_gpu(a, b, shared)
    iou.boxes_iou_bev_gpu(a, b, ious)
    iou.boxes_aligned_overlap_bev_gpu(a, b, paired)
    iou.boxes_aligned_iou_bev_cpu(a, b, paired_ious)
    assert torch.equal(shared, geometry.overlap_bev(a, b)) and shared.any()
    torch.testing.assert_close(paired[:, 0], shared.diagonal())
    torch.testing.assert_close(paired_ious[:, 0], ious.diagonal())
    iou.boxes_iou_bev_cpu(a[:0], b, torch.empty(0, 20))
    iou.boxes_overlap_bev_gpu(a, b[:0], torch.empty(20, 0))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.8])
def test_a_box_goes_where_it_overlaps_a_better_one_that_stays(turned, threshold):
    boxes = boxes_round(SETS["scattered"][0], 300, 3)
    flat = boxes.clone()
    if not turned:
        flat[:, 6] = 0
    over = geometry.iou_bev(flat, flat) > threshold
    stays = []
    for row in range(len(boxes)):
        if not any(over[row, better] for better in stays):
            stays.append(row)
    keep = torch.full((300,), -1)
    count = (iou.nms_gpu if turned else iou.nms_normal_gpu)(boxes, keep, threshold)
    assert keep[:count].tolist() == stays and count < 300
    assert iou.nms_gpu(boxes[:0], keep, threshold) == 0
    assert iou.nms_gpu(boxes[:1], keep, threshold) == 1
