"""The model is OpenPCDet's PointPillar: tests/golden/pointpillar holds what its own code gives."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raytrain.engine.sync_bn import convert_to_host_sync_batchnorm
from raytrain.errors import ConfigError
from raytrain.tasks.pointpillars.anchors import encode
from raytrain.tasks.pointpillars.model import PointPillar
from raytrain.tasks.pointpillars.model_options import Vfe
from raytrain.tasks.pointpillars.pillars import PillarFeatures, PillarLayer, scattered

GOLDEN = Path(__file__).parents[2] / "golden" / "pointpillar"
INFO = json.loads((GOLDEN / "info.json").read_text())
CLASS_NAMES = ["Car", "Pedestrian", "Cyclist"]
TOLERANCE = {"atol": 2e-5, "rtol": 0}


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def build(cfg=INFO["cfg_model"], class_names=CLASS_NAMES, reach=INFO["point_cloud_range"], voxel_size=(0.32, 0.32, 4)):
    return PointPillar(cfg, class_names, reach, voxel_size)


def trained_from_here():
    """The golden model at its first weights, in training, and its batch."""
    model = build()
    model.load_state_dict(golden("init_state"), strict=True)
    batch = golden("batch")
    names = ("voxels", "voxel_coords", "voxel_num_points", "gt_boxes")
    return model.train(), {name: batch[name] for name in names}


def changed(*keys, value):
    """The golden MODEL section with one key changed, or added."""
    cfg = copy.deepcopy(INFO["cfg_model"])
    section = cfg
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    return cfg


def plain_layer(layer, points):
    """What OpenPCDet's PFNLayer does, step by step."""
    values = layer.linear(points)
    if layer.use_norm:
        values = layer.norm(values.transpose(1, 2)).transpose(1, 2)
    values = values.relu()
    peak = values.max(1, keepdim=True)[0]
    return peak[:, 0] if layer.is_last else torch.cat([values, peak.expand_as(values)], 2)


def test_a_state_dict_of_openpcdet_fits_in_names_order_shapes_and_dtypes():
    found = [[name, list(value.shape), str(value.dtype)] for name, value in build().state_dict().items()]
    assert found == INFO["state_dict"]
    assert sum(p.numel() for p in build().parameters()) == INFO["params"]


def test_the_first_forward_and_its_loss_are_openpcdets():
    model, batch = trained_from_here()
    wanted, seen = golden("forward_train_init"), {}
    model.vfe.register_forward_hook(lambda module, inputs, output: seen.update(pillar_features=output))
    model.backbone_2d.register_forward_hook(lambda module, inputs, output: seen.update(spatial_features_2d=output))
    pillars = (batch["voxels"], batch["voxel_num_points"], batch["voxel_coords"])
    seen["pfn_input"] = model.vfe.decorated(*pillars)
    outputs = model(batch)
    loss, tb_dict = model.loss(outputs, batch["gt_boxes"])
    for name, value in {**seen, **outputs}.items():
        torch.testing.assert_close(value, wanted[name], **TOLERANCE)
    assert loss.item() == pytest.approx(INFO["loss"], abs=2e-5)
    assert {name: value.item() for name, value in tb_dict.items()} == pytest.approx(INFO["tb_dict"], abs=2e-5)
    assert list(tb_dict) == list(INFO["tb_dict"])
    assert not any(value.requires_grad for value in tb_dict.values())


def test_coordinates_may_be_floats_as_openpcdets_are():
    model, batch = trained_from_here()
    outputs = model.eval()(batch)
    floats = model({name: value.float() for name, value in batch.items()})
    assert all(torch.equal(outputs[name], floats[name]) for name in outputs)


def test_boxes_are_decoded_with_their_direction_as_openpcdet_does():
    model, wanted, forward = build(), golden("decode"), golden("forward_train_init")
    outputs = {name: forward[name] for name in ("cls_preds", "box_preds", "dir_cls_preds")}
    everything = torch.arange(6144).expand(2, -1)
    torch.testing.assert_close(model.decoded(outputs, everything), wanted["train_init_batch_box_preds"], **TOLERANCE)
    codes, directions = torch.zeros(1, 6144, 7), torch.zeros(1, 6144, 2)
    # an anchor may be drawn twice, so one at a time
    for number in range(0, 200, 20):
        index = wanted["rand_anchor_index"][number : number + 1]
        codes[0, index] = wanted["rand_encoding"][number]
        directions[0, index] = wanted["rand_dir_logits"][number]
        drawn = {"box_preds": codes.view(1, 32, 32, 42), "dir_cls_preds": directions.view(1, 32, 32, 12)}
        decoded = model.decoded(drawn, index[None])[0, 0]
        torch.testing.assert_close(decoded, wanted["rand_decoded_with_dir"][number], **TOLERANCE)


@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize("use_norm", [True, False])
@pytest.mark.parametrize("moving", [True, False])  # whether what comes in asks for a gradient, as from a layer before
def test_a_folded_layer_is_the_plain_layers_in_values_gradients_and_statistics(is_last, use_norm, moving):
    torch.manual_seed(0)
    layer = PillarLayer(10, 16, use_norm, is_last)
    if use_norm:
        nn.init.normal_(layer.norm.weight)  # some are negative: then the norm makes the smallest point the largest
        nn.init.normal_(layer.norm.bias)
    points = (torch.randn(30, 6, 10) * 5 + 20) * (torch.rand(30, 6, 1) > 0.4)
    points.requires_grad_(moving)
    twin, twin_points = copy.deepcopy(layer), points.detach().clone().requires_grad_(moving)
    found, wanted = layer(points), plain_layer(twin, twin_points)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-4)
    if moving:
        torch.testing.assert_close(points.grad, twin_points.grad, atol=1e-5, rtol=1e-4)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), buffer, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.eval()(points), plain_layer(twin.eval(), twin_points), **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(layer(points), plain_layer(twin, twin_points), **TOLERANCE)


@pytest.mark.parametrize("keys", [{}, {"WITH_DISTANCE": True}, {"USE_NORM": False}, {"USE_ABSLOTE_XYZ": False}])
@pytest.mark.parametrize("counts", [[1, 4, 2, 3], [4, 4, 4, 4], [1, 1, 1, 1], [4, 0, 1, 2], []], ids=str)
def test_points_give_what_their_slots_give(keys, counts, monkeypatch):
    """On a CPU only the points that are there are gone through: full pillars, lone points, one twice, none at all."""
    torch.manual_seed(0)
    options = Vfe(**{"NAME": "PillarVFE", "NUM_FILTERS": [8], **keys})
    by_points = PillarFeatures(options, [0, -2, -3, 4, 2, 1], [1, 1, 4])
    if by_points.pfn_layers[0].use_norm:
        nn.init.normal_(by_points.pfn_layers[0].norm.weight)
    by_slots = copy.deepcopy(by_points)
    num_points = torch.tensor(counts, dtype=torch.int32)
    voxels = torch.randn(len(counts), 4, 4) * (torch.arange(4) < num_points[:, None])[..., None]
    voxels[num_points > 1, 1] = voxels[num_points > 1, 0]
    coords = torch.tensor([[0, 0, i, i] for i in range(len(counts))], dtype=torch.int32).view(-1, 4)
    assert by_points.pfn_layers[0].takes_points
    found = by_points(voxels, num_points, coords)
    monkeypatch.setattr(PillarLayer, "takes_points", False)
    wanted = by_slots(voxels, num_points, coords)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    weights = torch.randn_like(found)
    for module, features in ((by_points, found), (by_slots, wanted)):
        (features * weights).sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    for one, other in zip(by_points.parameters(), by_slots.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    for one, other in zip(by_points.buffers(), by_slots.buffers(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_pillars_lie_in_their_cells_in_either_layout(channels_last):
    pillars = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    coords = torch.tensor([[0, 0, 1, 2], [1, 0, 0, 0], [1, 0, 1, 3]])
    bev = scattered(pillars, coords, 2, (4, 2), channels_last)
    wanted = torch.zeros(2, 2, 2, 4)
    wanted[0, :, 1, 2], wanted[1, :, 0, 0], wanted[1, :, 1, 3] = pillars.detach()
    assert torch.equal(bev, wanted)
    assert bev.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    bev.square().sum().backward()
    assert torch.equal(pillars.grad, 2 * pillars)


def test_the_model_trains_in_channels_last_memory():
    model, batch = trained_from_here()
    model.to(memory_format=torch.channels_last)
    loss, _ = model.loss(model(batch), batch["gt_boxes"])
    assert loss.item() == pytest.approx(INFO["loss"], abs=2e-5)


def test_synchronised_norms_see_what_the_pillars_norm_would(monkeypatch):
    monkeypatch.setattr("raytrain.engine.sync_bn.all_reduce", lambda tensor: tensor)  # one process
    layer = PillarLayer(10, 16, use_norm=True, is_last=True)
    points = torch.randn(30, 6, 10)
    wanted = copy.deepcopy(layer)(points)
    torch.testing.assert_close(convert_to_host_sync_batchnorm(layer)(points), wanted, **TOLERANCE)


@pytest.mark.parametrize(
    ("keys", "value", "num_in"),
    [
        (("VFE", "WITH_DISTANCE"), True, 11),
        (("VFE", "USE_ABSLOTE_XYZ"), False, 7),
        (("VFE", "NUM_FILTERS"), [8, 16], 10),
    ],
)
def test_the_other_pillar_features_are_there_too(keys, value, num_in):
    model, (_, batch) = build(changed(*keys, value=value)), trained_from_here()
    assert model.vfe.pfn_layers[0].linear.in_features == num_in
    model(batch)["cls_preds"].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.vfe.parameters())


def test_a_step_asks_the_device_nothing():
    """The meta device has shapes but no values: whatever waited for one on a GPU raises there."""
    model, batch = trained_from_here()
    model.to("meta")
    batch = {name: value.to("meta") for name, value in batch.items()}
    loss, _ = model.loss(model(batch), batch["gt_boxes"])
    loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_under_autocast_is_finite_and_its_loss_float32(dtype):
    model, batch = trained_from_here()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(batch)
        loss, _ = model.loss(outputs, batch["gt_boxes"])
        model.predictions(outputs)
    loss.backward()
    assert outputs["cls_preds"].dtype is dtype
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(INFO["loss"], rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_loss_of_the_surest_wrong_answers_is_finite():
    model, batch = trained_from_here()
    outputs = {name: (value * 0 - 6e4).requires_grad_() for name, value in model(batch).items()}
    outputs = {name: value.detach().half().requires_grad_() for name, value in outputs.items()}
    loss, _ = model.loss(outputs, batch["gt_boxes"])
    loss.backward()
    assert loss.isfinite() and all(value.grad.isfinite().all() for value in outputs.values())


def test_batches_of_empty_frames_train_on_background():
    model, batch = trained_from_here()
    for rows in (0, 3):
        loss, tb_dict = model.loss(model(batch), torch.zeros(2, rows, 8))
        loss.backward()
        assert loss.isfinite() and tb_dict["rpn_loss_loc"] == 0 and tb_dict["rpn_loss_dir"] == 0


def test_batches_without_a_single_point_train_on_background_and_leave_the_statistics_as_they_are():
    model, batch = trained_from_here()
    before = copy.deepcopy(model.vfe.state_dict())
    nothing = {name: batch[name][:0] for name in ("voxels", "voxel_coords", "voxel_num_points")}
    loss, _ = model.loss(model({**batch, **nothing}), torch.zeros(2, 1, 8))
    loss.backward()
    assert loss.isfinite() and all(
        value.grad.isfinite().all() for value in model.parameters() if value.grad is not None
    )
    assert all(torch.equal(value, before[name]) for name, value in model.vfe.state_dict().items())


def test_training_forwards_are_counted_and_others_are_not():
    model, batch = trained_from_here()
    model(batch), model(batch), model.eval()(batch)
    assert model.state_dict()["global_step"].tolist() == [2]


def test_a_box_that_the_head_is_sure_of_comes_out_as_it_is():
    model = build()
    box = torch.tensor([8.0, 2.0, -1.0, 4.1, 1.7, 1.5, -2.5])  # seen from its front
    anchors = model.anchors.boxes()
    logits = torch.full((2, 32, 32, 6, 3), -9.0)
    codes, directions = torch.zeros(2, 32, 32, 6, 7), torch.zeros(2, 32, 32, 6, 2)
    for x, score in ((11, 2.0), (12, 3.0), (13, 1.0)):  # three anchors say the same
        logits[1, 19, x, 0, 0] = score
        codes[1, 19, x, 0] = encode(box, anchors[19, x, 0])
        directions[1, 19, x, 0, int((box[6] - 0.78539) % (2 * torch.pi) // torch.pi)] = 1
    logits[1, 5, 5, 4, 2] = 0.5
    outputs = {"cls_preds": logits, "box_preds": codes, "dir_cls_preds": directions}
    empty, found = model.predictions({name: value.flatten(3) for name, value in outputs.items()})
    assert [len(empty[name]) for name in ("boxes", "scores", "labels")] == [0, 0, 0]
    assert found["labels"].tolist() == [1, 3]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 0.5]).sigmoid())
    difference = found["boxes"][0] - box
    torch.testing.assert_close(difference[:6], torch.zeros(6), **TOLERANCE)
    assert difference[6].cos() == pytest.approx(1)


def test_raw_scores_are_logits():
    model = build(changed("POST_PROCESSING", "OUTPUT_RAW_SCORE", value=True))
    wanted = golden("forward_train_init")
    outputs = {name: wanted[name] for name in ("cls_preds", "box_preds", "dir_cls_preds")}
    outputs["cls_preds"] = outputs["cls_preds"] + 3
    found, usual = model.predictions(outputs)[0], build().predictions(outputs)[0]
    assert len(found["scores"]) > 0
    torch.testing.assert_close(found["scores"].sigmoid(), usual["scores"])


def test_the_same_batch_gives_the_same_gradients():
    gradients = []
    for _ in range(2):
        model, batch = trained_from_here()
        model.loss(model(batch), batch["gt_boxes"])[0].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.equal(*gradients)


ASSIGNER = ("DENSE_HEAD", "TARGET_ASSIGNER_CONFIG")
NMS = ("POST_PROCESSING", "NMS_CONFIG")
ANCHORS = "ANCHOR_GENERATOR_CONFIG"


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("VFE", "WITH_DISTANCES"), True, "did you mean MODEL.VFE.WITH_DISTANCE?"),
        (("DENSE_HEAD", ANCHORS, 0, "anchor_size"), [], "did you mean .*anchor_sizes?"),
        (("BACKBONE_2D", "LAYER_NUMS"), [1, 1], "MODEL.BACKBONE_2D.*equally long"),
        (("MAP_TO_BEV", "NUM_BEV_FEATURES"), 64, "NUM_BEV_FEATURES is 64, but VFE.NUM_FILTERS ends with 16"),
        (("BACKBONE_2D", "UPSAMPLE_STRIDES"), [1, 2, 2], "do not fit together"),
        (("BACKBONE_2D", "UPSAMPLE_STRIDES"), [2, 4, 8], "Car's feature_map_stride is 2"),
        ((*ASSIGNER, "POS_FRACTION"), 0.5, "POS_FRACTION is 0.5, but .* set it to -1"),
        ((*ASSIGNER, "MATCH_HEIGHT"), True, "MATCH_HEIGHT is true, but"),
        ((*NMS, "NMS_TYPE"), "multi_class_nms", "NMS_TYPE .* must be one of nms_gpu, nms_cpu"),
        ((*NMS, "MULTI_CLASSES_NMS"), True, "MULTI_CLASSES_NMS is true, but .* set it to false"),
        (("DENSE_HEAD", ANCHORS), INFO["cfg_model"]["DENSE_HEAD"][ANCHORS][:2], "anchors for Car, Pedestrian, but"),
        (("DENSE_HEAD", "NAME"), "CenterHead", "MODEL.DENSE_HEAD.NAME .* must be AnchorHeadSingle"),
    ],
)
def test_what_cannot_be_is_refused_by_name(keys, value, told):
    with pytest.raises(ConfigError, match=told):
        build(changed(*keys, value=value))


def test_pillars_are_as_high_as_the_range():
    with pytest.raises(ConfigError, match="2 voxels above each other"):
        build(voxel_size=(0.32, 0.32, 2))


def test_maps_below_a_pillar_and_half_strides_work():
    cfg = changed("BACKBONE_2D", "UPSAMPLE_STRIDES", value=[0.5, 1, 2])
    for anchor in cfg["DENSE_HEAD"][ANCHORS]:
        anchor["feature_map_stride"] = 4
    model, (_, batch) = build(cfg), trained_from_here()
    assert model.backbone_2d.deblocks[0][0].weight.shape == (12, 16, 2, 2)
    assert model(batch)["cls_preds"].shape == (2, 16, 16, 18)
    assert F.relu(model.loss(model(batch), batch["gt_boxes"])[0]) > 0
