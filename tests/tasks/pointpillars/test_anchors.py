"""Anchors, targets and the box coder are OpenPCDet's: tests/golden/pointpillar holds what its own code gives."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from raytrain.tasks.pointpillars import anchors as anchors_module
from raytrain.tasks.pointpillars.anchors import Anchors, decode, encode
from raytrain.tasks.pointpillars.geometry import iou_axis_aligned, nearest_bev
from raytrain.tasks.pointpillars.model_options import AnchorClass

GOLDEN = Path(__file__).parents[2] / "golden" / "pointpillar"
INFO = json.loads((GOLDEN / "info.json").read_text())
CLASS_NAMES = ["Car", "Pedestrian", "Cyclist"]
CLASSES = [AnchorClass(**entry) for entry in INFO["cfg_model"]["DENSE_HEAD"]["ANCHOR_GENERATOR_CONFIG"]]
TOLERANCE = {"atol": 2e-5, "rtol": 0}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def anchors_of(classes=CLASSES, map_size=(32, 32), reach=INFO["point_cloud_range"]):
    return Anchors(classes, CLASS_NAMES, map_size, reach)


def random_boxes(frames, rows, seed=0):
    """(frames, rows, 8): boxes of all classes within the golden range, the last frame empty, others padded."""
    draw = np.random.RandomState(seed)
    boxes = np.zeros((frames, rows, 8), dtype=np.float32)
    for frame in range(frames - 1):
        count = draw.randint(1, rows)
        sizes = np.array([[3.9, 1.6, 1.56], [0.8, 0.6, 1.73], [1.76, 0.6, 1.73]])
        label = draw.randint(0, 3, count)
        boxes[frame, :count, :3] = draw.uniform([0, -10, -1.5], [20, 10, 0], (count, 3))
        boxes[frame, :count, 3:6] = sizes[label] * draw.uniform(0.8, 1.2, (count, 3))
        boxes[frame, :count, 6] = draw.uniform(-4, 4, count)
        boxes[frame, :count, 7] = label + 1
    return torch.from_numpy(boxes)


def assigned_one_by_one(anchors, gt_boxes):
    """Labels (A,) and box numbers (A,) of one frame as OpenPCDet assigns them, anchor by anchor."""
    boxes = anchors.boxes()
    labels = torch.full(boxes.shape[:3], -1)
    rows = torch.zeros(boxes.shape[:3], dtype=torch.int64)
    for matching in anchors.matchings:
        kinds = list(matching.kinds)
        mine = (gt_boxes[:, 7] == matching.label).nonzero()[:, 0]
        if len(mine) == 0:
            labels[:, :, kinds] = 0
            continue
        overlap = iou_axis_aligned(nearest_bev(boxes[:, :, kinds].reshape(-1, 7)), nearest_bev(gt_boxes[mine, :7]))
        best, row = overlap.max(1)
        label = torch.full_like(row, -1)
        label[best >= matching.matched] = matching.label
        label[best < matching.unmatched] = 0
        for column in overlap.T:
            if column.max() > 0:
                label[column == column.max()] = matching.label
        labels[:, :, kinds] = label.view(*labels.shape[:2], -1)
        rows[:, :, kinds] = mine[row].view(*labels.shape[:2], -1)
    return labels.flatten(), rows.flatten()


def codes_of_all(found):
    """(B, A, 7), zeros for anchors without a class."""
    codes = torch.zeros(found.labels.numel(), 7)
    codes[found.anchors] = torch.where((found.labels.flatten()[found.anchors] > 0)[:, None], found.codes, 0.0)
    return codes.view(*found.labels.shape, 7)


def test_anchors_stand_where_openpcdets_stand():
    wanted = torch.cat([golden("anchors")[f"class{number}"] for number in range(3)], dim=-3)  # z y x size rotation 7
    torch.testing.assert_close(anchors_of().boxes(), wanted[0].flatten(2, 3), **TOLERANCE)


def test_centred_anchors_stand_in_the_middle_of_their_cells():
    one = CLASSES[0].model_copy(update={"align_center": True})
    boxes = anchors_of([one], map_size=(4, 2), reach=[0, -1, -3, 8, 1, 1]).boxes()
    assert boxes[0, :, 0, 0].tolist() == [1, 3, 5, 7]
    assert boxes[:, 0, 0, 1].tolist() == [-0.5, 0.5]


def test_targets_are_openpcdets():
    wanted = golden("targets")
    found = anchors_of().assign(golden("batch")["gt_boxes"])
    assert torch.equal(found.labels, wanted["box_cls_labels"].long())
    torch.testing.assert_close(codes_of_all(found), wanted["box_reg_targets"], **TOLERANCE)
    assert torch.equal((found.labels > 0).float(), wanted["reg_weights"])


@pytest.mark.parametrize("device", ["cpu", "as on a GPU"])
@pytest.mark.parametrize("seed", range(4))
def test_a_batch_is_assigned_as_its_frames_are_one_by_one(seed, device, monkeypatch):
    anchors, gt_boxes = anchors_of(), random_boxes(3, 25, seed)
    if device != "cpu":
        monkeypatch.setattr(anchors_module, "_would_wait", lambda tensor: True)
    found = anchors.assign(gt_boxes)
    assert len(found.anchors) == (found.labels.numel() if device != "cpu" else (found.labels > 0).sum())
    of_all = codes_of_all(found)
    for frame, boxes in enumerate(gt_boxes):
        labels, rows = assigned_one_by_one(anchors, boxes)
        assert torch.equal(found.labels[frame], labels)
        positive = labels > 0
        codes = encode(boxes[rows[positive], :7], anchors.boxes().flatten(0, 2)[positive])
        torch.testing.assert_close(of_all[frame][positive], codes, **TOLERANCE)


def test_a_box_as_near_to_two_anchors_goes_to_both():
    one = CLASSES[0].model_copy(update={"anchor_sizes": [[4.0, 2.0, 1.5]], "anchor_rotations": [0.0]})
    anchors = anchors_of([one], map_size=(3, 1), reach=[0, -8, -3, 16, 8, 1])  # at x 0, 8, 16
    labels = anchors.assign(torch.tensor([[[4.0, 0, -1, 6, 2, 1.5, 0, 1]]])).labels
    assert labels.tolist() == [[1, 1, 0]]


def test_frames_without_boxes_are_all_background():
    found = anchors_of().assign(torch.zeros(2, 0, 8))
    assert not found.labels.any() and not len(found.anchors)
    assert found.labels.shape == (2, 6144)


def test_boxes_are_encoded_and_decoded_as_openpcdet_does():
    wanted = golden("decode")
    anchors = anchors_of().boxes().flatten(0, 2)[wanted["rand_anchor_index"]]
    decoded = decode(wanted["rand_encoding"], anchors)
    torch.testing.assert_close(decoded, wanted["rand_decoded"], **TOLERANCE)
    torch.testing.assert_close(encode(decoded, anchors), wanted["rand_reencoded"], **TOLERANCE)


def test_anchors_travel_as_a_few_kilobytes_and_not_with_the_weights():
    anchors = anchors_of(map_size=(216, 248), reach=[0, -39.68, -3, 69.12, 39.68, 1])
    assert math.prod(anchors.boxes().shape[:3]) == 321_408
    assert sum(buffer.nbytes for buffer in anchors.buffers()) < 16_384
    assert not anchors.state_dict()
