"""Samples and batches: what goes in, what is left out, and in which order; and the options that say so."""

import copy
import pickle

import numpy as np
import pytest
import torch
from kitti_frames import CALIBRATION, kitti_mini, made_up_frame, write_kitti
from torch.utils.data import default_convert

from raytrain.batch import move_to
from raytrain.engine.randomness import random_state, seed_all
from raytrain.errors import ConfigError
from raytrain.tasks.pointpillars.data_options import read_data_options, without_effect
from raytrain.tasks.pointpillars.dataset import LastEpochs, LidarDataset, SampleFrame, collate
from raytrain.tasks.pointpillars.frames import Annotations, Frame, annotations_of
from raytrain.tasks.pointpillars.kitti import KittiSource

CLASSES = ["Car", "Pedestrian", "Cyclist"]
# kitti_models/pointpillar.yaml on top of dataset_configs/kitti_dataset.yaml, as OpenPCDet merges them.
OPENPCDETS = {
    "DATASET": "KittiDataset",
    "DATA_PATH": "../data/kitti",
    "POINT_CLOUD_RANGE": [0, -39.68, -3, 69.12, 39.68, 1],
    "DATA_SPLIT": {"train": "train", "test": "val"},
    "INFO_PATH": {"train": ["kitti_infos_train.pkl"], "test": ["kitti_infos_val.pkl"]},
    "GET_ITEM_LIST": ["points"],
    "FOV_POINTS_ONLY": True,
    "DATA_AUGMENTOR": {
        "DISABLE_AUG_LIST": ["placeholder"],
        "AUG_CONFIG_LIST": [{"NAME": "random_world_flip", "ALONG_AXIS_LIST": ["x"]}],
    },
    "POINT_FEATURE_ENCODING": {
        "encoding_type": "absolute_coordinates_encoding",
        "used_feature_list": ["x", "y", "z", "intensity"],
        "src_feature_list": ["x", "y", "z", "intensity"],
    },
    "DATA_PROCESSOR": [
        {"NAME": "mask_points_and_boxes_outside_range", "REMOVE_OUTSIDE_BOXES": True},
        {"NAME": "shuffle_points", "SHUFFLE_ENABLED": {"train": True, "test": False}},
        {
            "NAME": "transform_points_to_voxels",
            "VOXEL_SIZE": [0.16, 0.16, 4],
            "MAX_POINTS_PER_VOXEL": 32,
            "MAX_NUMBER_OF_VOXELS": {"train": 16000, "test": 40000},
        },
    ],
}


class Listed:
    """A source of frames that are there."""

    def __init__(self, *frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def frame(self, index):
        return self.frames[index]


class Shift:
    """An augmentation that can be told from its absence."""

    def __init__(self, metres=1.0):
        self.metres = metres

    def __call__(self, points, boxes, names):
        move = np.random.uniform(0, self.metres)
        points, boxes = points.copy(), boxes.copy()
        points[:, 0] += np.float32(move)
        boxes[:, 0] += move
        return points, boxes, names

    def without(self, names):
        return Shift(0.0) if "shift" in names else self


def options(**changes):
    found = copy.deepcopy(OPENPCDETS)
    for place, change in changes.pop("processors", {}).items():
        found["DATA_PROCESSOR"][place].update(change)
    return read_data_options({**found, **changes})


def dataset(*frames, training=True, augmentor=None, last_epochs=None, **changes):
    return LidarDataset(Listed(*frames), options(**changes), CLASSES, training, augmentor, last_epochs)


def frame_of(names, boxes, points=((10.0, 0, 0, 0.5),)):
    annotations = annotations_of(np.array(names, dtype=np.str_), np.array(boxes, dtype=float), CALIBRATION)
    return Frame("000042", np.array(points, dtype=np.float32).reshape(-1, 4), annotations, CALIBRATION)


def sample(data, index=0, seed=0):
    seed_all(seed, "sample", index)
    return data[index]


def assert_equal(a, b):
    assert all(np.array_equal(a[key], b[key]) for key in ("voxels", "voxel_coords", "voxel_num_points", "gt_boxes"))


def test_openpcdets_own_data_config_is_read_and_what_has_no_effect_is_said():
    found = options()
    assert found.processors.voxels.VOXEL_SIZE == [0.16, 0.16, 4]
    assert (found.SOURCE, found.DATA_SPLIT.test, found.FOV_POINTS_ONLY) == ("kitti", "val", True)
    assert without_effect(found) == (
        "DATA_CONFIG.DATASET, DATA_CONFIG.INFO_PATH, DATA_CONFIG.GET_ITEM_LIST have no effect: "
        "frames are read from KITTI's own files"
    )
    theirs = ("DATASET", "INFO_PATH", "GET_ITEM_LIST")
    assert without_effect(read_data_options({k: v for k, v in OPENPCDETS.items() if k not in theirs})) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"FOV_POINT_ONLY": True}, r"^DATA_CONFIG.FOV_POINT_ONLY is unknown .* mean DATA_CONFIG.FOV_POINTS_ONLY\?"),
        ({"SOURCE": "nuscenes"}, r"^DATA_CONFIG.SOURCE is \"nuscenes\", but it must be one of simulated, kitti"),
        ({"DATA_PATH": None}, r"^DATA_CONFIG.DATA_PATH is missing; SOURCE kitti needs it"),
        ({"POINT_CLOUD_RANGE": [0, 40, -3, 70, -40, 1]}, r"^DATA_CONFIG.POINT_CLOUD_RANGE is .* lowest x, y, z"),
        ({"POINT_CLOUD_RANGE": [0, -40, -3, 70.4, 40.1, 1]}, r"80.1 m along y, 500.625 voxels .* a whole number"),
        (
            {"processors": {2: {"MAX_POINT_PER_VOXEL": 5}}},
            r"^DATA_CONFIG.DATA_PROCESSOR\[2\].MAX_POINT_PER_VOXEL is unknown .* mean .*MAX_POINTS_PER_VOXEL\?",
        ),
        ({"processors": {0: {"NAME": "sample_points"}}}, r"DATA_PROCESSOR\[0\].NAME 'sample_points' is unknown; there"),
        ({"processors": {1: {"NAME": "mask_points_and_boxes_outside_range"}}}, r"\[1\].NAME 'mask.*' comes twice"),
        ({"DATA_PROCESSOR": OPENPCDETS["DATA_PROCESSOR"][::-1]}, r"it must have, in this order, mask_points"),
        ({"DATA_PROCESSOR": []}, r"DATA_PROCESSOR has nothing; it must have"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(changes, told):
    with pytest.raises(ConfigError, match=told):
        options(**changes)


def test_boxes_are_of_the_classes_in_range_with_an_extent_and_have_their_class():
    car = [20.0, 1, -1, 4, 2, 1.5, 0.5]
    frame = frame_of(
        ["Cyclist", "DontCare", "Van", "Car", "Car", "Car", "Pedestrian"],
        [
            car,
            [30.0, 0, -1, -1, -1, -1, 0],
            car,
            [70.0, 0, -1, 4, 2, 1.5, 0],  # begins in the range, its centre is beyond
            [69.0, 0, -1, 4, 2, 1.5, 0],  # ends beyond, its centre is in
            [30.0, 0, -1, 4, 0, 1.5, 0],
            [20.0, 5, -1, 1, 1, 1.8, 6.0],
        ],
    )
    for training in (True, False):
        boxes = dataset(frame, training=training)[0]["gt_boxes"]
        assert boxes.dtype == np.float32
        assert boxes[:, 7].tolist() == [3, 1, 2]
        np.testing.assert_allclose(boxes[0, :7], car, atol=1e-6)
        np.testing.assert_allclose(boxes[2, 6], 6.0 - 2 * np.pi, atol=1e-6)
    by_corners = {"USE_CENTER_TO_FILTER": False, "min_num_corners": 1}
    assert dataset(frame, processors={0: by_corners})[0]["gt_boxes"][:, 7].tolist() == [3, 1, 1, 2]
    four = {"USE_CENTER_TO_FILTER": False, "min_num_corners": 5}
    assert dataset(frame, processors={0: four})[0]["gt_boxes"][:, 7].tolist() == [3, 2]
    assert dataset(frame, processors={0: {"REMOVE_OUTSIDE_BOXES": False}})[0]["gt_boxes"][:, 7].tolist() == [3, 1, 1, 2]


def test_points_are_those_that_the_camera_sees_in_range():
    ahead, behind, beside, beyond = (20.0, 0, 0, 0.1), (-20.0, 0, 0, 0.2), (10.0, 30, 0, 0.3), (80.0, 0, 0, 0.4)
    frame = frame_of([], np.zeros((0, 7)), [ahead, behind, beside, beyond])
    seen = dataset(frame, training=False)[0]
    np.testing.assert_array_equal(seen["frame"].points, np.float32([ahead]))
    assert seen["voxel_coords"].tolist() == [[0, 248, 125]]
    whole = dataset(frame, training=False, FOV_POINTS_ONLY=False)[0]
    np.testing.assert_array_equal(whole["frame"].points, np.float32([ahead, beside]))


def test_a_training_sample_is_a_function_of_its_seed_and_an_evaluation_sample_draws_nothing():
    frame = made_up_frame("000001", ("Car", "Van", "Pedestrian"), num_points=4000)
    train = dataset(frame, augmentor=Shift())
    assert_equal(sample(train, seed=3), sample(train, seed=3))
    assert not np.array_equal(sample(train, seed=3)["gt_boxes"], sample(train, seed=4)["gt_boxes"])
    val = dataset(frame, training=False, augmentor=Shift())
    before = random_state()
    np.testing.assert_allclose(val[0]["gt_boxes"][:, :3], frame.boxes[[0, 2], :3], atol=1e-5)
    assert random_state() == before
    assert sample(train)["frame"].points is None and val[0]["frame"].points is not None


def test_shuffling_changes_the_order_of_voxels_and_no_point():
    frame = made_up_frame("000001", num_points=4000)
    train, val = sample(dataset(frame)), sample(dataset(frame, training=False))
    assert not np.array_equal(train["voxel_coords"], val["voxel_coords"])
    points = [np.sort(one["voxels"].reshape(-1, 4), axis=0) for one in (train, val)]
    np.testing.assert_array_equal(*points)
    still = {"SHUFFLE_ENABLED": {"train": False, "test": False}}
    assert_equal(sample(dataset(frame, processors={1: still})), val)


def test_the_hook_ends_augmentations_at_its_epoch_and_a_resumed_run_knows():
    frame = made_up_frame("000001", num_points=100)
    train = dataset(frame, augmentor=Shift(), last_epochs=LastEpochs(8, ("shift",)))
    plain = sample(dataset(frame))
    for epoch, moved in ((0, True), (7, True), (8, False), (9, False), (3, True)):
        train.set_epoch(epoch)
        assert np.array_equal(sample(train)["gt_boxes"], plain["gt_boxes"]) is not moved
    other = dataset(frame, augmentor=Shift(), last_epochs=LastEpochs(8, ("random_world_flip",)))
    other.set_epoch(9)
    assert not np.array_equal(sample(other)["gt_boxes"], plain["gt_boxes"])


def test_a_batch_numbers_its_samples_and_fills_up_boxes_with_zeros():
    frames = [made_up_frame("000001"), made_up_frame("000002", ()), made_up_frame("000003", ("Car", "Car", "Car"))]
    data = dataset(*frames, training=False)
    samples = [data[i] for i in range(3)]
    batch = default_convert(collate(samples))
    assert batch["gt_boxes"].shape == (3, 3, 8)
    assert (batch["gt_boxes"][..., 7] > 0).sum(1).tolist() == [2, 0, 3]
    assert (batch["gt_boxes"].dtype, batch["voxel_coords"].dtype) == (torch.float32, torch.int32)
    for i, one in enumerate(samples):
        of_sample = (batch["voxel_coords"][:, 0] == i).numpy()
        np.testing.assert_array_equal(batch["voxel_coords"][of_sample][:, 1:], one["voxel_coords"])
        np.testing.assert_array_equal(batch["voxels"][of_sample], one["voxels"])
        np.testing.assert_array_equal(batch["voxel_num_points"][of_sample], one["voxel_num_points"])
    assert [(type(frame), frame.name) for frame in batch["frame"]] == [(SampleFrame, frame.name) for frame in frames]
    moved = move_to(batch, torch.device("cpu"))
    assert isinstance(moved["frame"][2].annotations, Annotations) and len(moved["frame"][2].annotations) == 3


def test_a_batch_without_any_object_has_room_for_one():
    batch = collate([dataset(made_up_frame("000002", ()))[0]])
    assert batch["gt_boxes"].shape == (1, 1, 8) and not batch["gt_boxes"].any()


def test_frames_written_in_kittis_layout_give_the_same_samples_in_loader_workers_too(tmp_path):
    frames = [made_up_frame("000001", num_points=3000), made_up_frame("000002", ("Van", "Cyclist"), num_points=3000)]
    written = KittiSource(write_kitti(tmp_path, frames), "train")
    train = LidarDataset(written, options(), CLASSES, True, Shift(), LastEpochs(5, ("shift",)))
    sent = pickle.loads(pickle.dumps(train))
    for i in range(2):
        expected = sample(dataset(*frames, augmentor=Shift()), i)
        assert_equal(sample(train, i), expected)
        assert_equal(sample(sent, i), expected)


def test_genuine_frames_give_the_objects_and_points_that_are_in_them(tmp_path):
    data = LidarDataset(KittiSource(kitti_mini(tmp_path), "val"), options(), CLASSES, False)
    samples = [data[i] for i in range(3)]
    # Of frame 000001 the truck is no class, the DontCare rows are no objects; all six cars of 000008 are in range.
    assert [one["gt_boxes"][:, 7].tolist() for one in samples] == [[2], [1, 3], [1] * 6]
    np.testing.assert_allclose(samples[2]["gt_boxes"][0, :3], [3.970, 2.717, -0.945], atol=1e-3)
    for one in samples:
        points = one["frame"].points
        cells = np.floor((points[:, :3] - np.float32([0, -39.68, -3])) / np.float32([0.16, 0.16, 4]))
        inside = ((cells >= 0) & (cells < [432, 496, 1])).all(1)
        places, counts = np.unique(cells[inside], axis=0, return_counts=True)
        assert len(one["voxels"]) == len(places)
        assert one["voxel_num_points"].sum() == np.minimum(counts, 32).sum()
