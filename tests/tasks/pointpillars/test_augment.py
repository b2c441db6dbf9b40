"""Augmentation: OpenPCDet's formulas by hand, what gt_sampling promises, and what a config may say."""

import copy
import pickle

import numpy as np
import pytest

from raytrain.errors import ConfigError, TaskError
from raytrain.tasks.pointpillars.augment import Augmentor, flipped, scaled, turned
from raytrain.tasks.pointpillars.database import Database, overlaps
from raytrain.tasks.pointpillars.frames import corners, points_in_boxes

CLASSES = ["Car", "Pedestrian", "Cyclist"]
FLIP = {"NAME": "random_world_flip", "ALONG_AXIS_LIST": ["x", "y"]}
TURN = {"NAME": "random_world_rotation", "WORLD_ROT_ANGLE": [-0.78539816, 0.78539816]}
SCALE = {"NAME": "random_world_scaling", "WORLD_SCALE_RANGE": [0.95, 1.05]}
SAMPLING = {
    "NAME": "gt_sampling",
    "USE_ROAD_PLANE": False,
    "DB_INFO_PATH": ["kitti_dbinfos_train.pkl"],
    "PREPARE": {"filter_by_min_points": ["Car:5", "Pedestrian:5"], "filter_by_difficulty": [-1]},
    "SAMPLE_GROUPS": ["Car:15", "Pedestrian:10"],
    "NUM_POINT_FEATURES": 4,
    "DATABASE_WITH_FAKELIDAR": False,
    "REMOVE_EXTRA_WIDTH": [0.0, 0.0, 0.0],
    "LIMIT_WHOLE_SCENE": True,
}
POINTS = np.array([[1, 2, 3, 0.5], [-4, 5, -1, 0.1]], np.float32)
BOXES = np.array([[10.0, 2.0, -1.0, 4.0, 1.6, 1.5, 0.3]])
NAMES = np.array(["Car"])


def section(*steps, **more):
    return {"DISABLE_AUG_LIST": ["placeholder"], "AUG_CONFIG_LIST": [copy.deepcopy(step) for step in steps], **more}


def scene(num_points=3000, num_boxes=8, seed=1):
    """Points in and about boxes of all headings."""
    random = np.random.RandomState(seed)
    boxes = np.column_stack(
        [
            random.uniform(-30, 30, (num_boxes, 2)),
            random.uniform(-1, 0, num_boxes),
            random.uniform(0.5, 5, (num_boxes, 3)),
            random.uniform(-4, 4, num_boxes),
        ]
    )
    of = boxes[random.randint(num_boxes, size=num_points)]
    points = np.column_stack([of[:, :3] + random.uniform(-2, 2, (num_points, 3)), random.uniform(0, 1, num_points)])
    return points.astype(np.float32), boxes, np.array(["Car"] * num_boxes)


def line_of_cars(number, apart=10.0, width=1.6):
    """A database of cars of 3 points each, side by side along y."""
    boxes = np.array([[20.0, apart * i, -1.0, 4.0, width, 1.5, 0.0] for i in range(number)])
    points = np.array([[0.5 * i, 0.1, 0.2, 0.01 * number] for i in range(3)] * number, np.float32)
    return Database(("Car",), np.zeros(number, np.int64), boxes, 3 * np.arange(number + 1), points)


def sampler(database, **changed):
    return Augmentor(section({**SAMPLING, **changed}), CLASSES, database)


def test_a_flip_along_x_negates_y_and_the_heading():
    points, boxes = flipped(POINTS, BOXES, "x")
    np.testing.assert_array_equal(points, np.array([[1, -2, 3, 0.5], [-4, -5, -1, 0.1]], np.float32))
    np.testing.assert_allclose(boxes, [[10, -2, -1, 4, 1.6, 1.5, -0.3]])


def test_a_flip_along_y_negates_x_and_mirrors_the_heading():
    points, boxes = flipped(POINTS, BOXES, "y")
    np.testing.assert_array_equal(points, np.array([[-1, 2, 3, 0.5], [4, 5, -1, 0.1]], np.float32))
    np.testing.assert_allclose(boxes, [[-10, 2, -1, 4, 1.6, 1.5, -0.3 - np.pi]])


def test_a_quarter_turn_takes_x_to_y():
    points, boxes = turned(POINTS, BOXES, np.pi / 2)
    np.testing.assert_allclose(points, [[-2, 1, 3, 0.5], [-5, -4, -1, 0.1]], atol=1e-6)
    np.testing.assert_allclose(boxes, [[-2, 10, -1, 4, 1.6, 1.5, 0.3 + np.pi / 2]], atol=1e-12)


def test_a_turn_by_30_degrees_is_as_worked_out_by_hand():
    points, _ = turned(np.array([[2, 0, 1, 0], [0, 2, 1, 0]], np.float32), BOXES, np.pi / 6)
    np.testing.assert_allclose(points, [[np.sqrt(3), 1, 1, 0], [-1, np.sqrt(3), 1, 0]], atol=1e-6)


def test_scaling_leaves_reflectance_and_heading():
    points, boxes = scaled(POINTS, BOXES, 1.5)
    np.testing.assert_array_equal(points, np.array([[1.5, 3, 4.5, 0.5], [-6, 7.5, -1.5, 0.1]], np.float32))
    np.testing.assert_allclose(boxes, [[15, 3, -1.5, 6, 2.4, 2.25, 0.3]])


@pytest.mark.parametrize("seed", range(12))
def test_points_stay_in_their_boxes_and_headings_in_one_turn(seed):
    points, boxes, names = scene()
    tight, loose = boxes.copy(), boxes.copy()
    tight[:, 3:6] -= 1e-3
    loose[:, 3:6] += 1e-3
    np.random.seed(seed)
    new_points, new_boxes, new_names = Augmentor(section(FLIP, TURN, SCALE), CLASSES)(points, boxes, names)
    now = points_in_boxes(new_points, new_boxes)
    assert (now | ~points_in_boxes(points, tight)).all()
    assert (~now | points_in_boxes(points, loose)).all()
    assert now.sum() > 100
    assert (new_boxes[:, 6] >= -np.pi).all() and (new_boxes[:, 6] < np.pi).all()
    assert new_points.dtype == np.float32 and new_boxes.dtype == boxes.dtype and (new_names == names).all()


def test_what_is_drawn_is_what_openpcdet_draws():
    """Each axis a coin, then an angle, then a factor, in numpy's global generator."""
    np.random.seed(5)
    along_x, along_y = (np.random.choice([False, True], replace=False, p=[0.5, 0.5]) for _ in range(2))
    angle, factor = np.random.uniform(-0.78539816, 0.78539816), np.random.uniform(0.95, 1.05)
    x, y, heading = 10.0, 2.0, 0.3
    if along_x:
        y, heading = -y, -heading
    if along_y:
        x, heading = -x, -(heading + np.pi)
    turned_x, turned_y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    heading = (heading + angle + np.pi) % (2 * np.pi) - np.pi
    expected = np.array([turned_x, turned_y, -1.0, 4.0, 1.6, 1.5]) * factor
    np.random.seed(5)
    _, boxes, _ = Augmentor(section(FLIP, TURN, SCALE), CLASSES)(POINTS, BOXES, NAMES)
    np.testing.assert_allclose(boxes[0], [*expected, heading], atol=1e-12)


def test_one_angle_means_to_both_sides():
    np.random.seed(0)
    augmentor = Augmentor(section({**TURN, "WORLD_ROT_ANGLE": 0.5}), CLASSES)
    angles = [augmentor(POINTS, BOXES, NAMES)[1][0, 6] - 0.3 for _ in range(200)]
    assert -0.5 <= min(angles) < -0.45 and 0.45 < max(angles) <= 0.5


def test_what_is_given_stays_as_it_was():
    points, boxes, names = scene()
    before = points.copy(), boxes.copy()
    np.random.seed(0)
    Augmentor(section(SAMPLING, FLIP, TURN, SCALE), CLASSES, line_of_cars(3))(points, boxes, names)
    np.testing.assert_array_equal(points, before[0])
    np.testing.assert_array_equal(boxes, before[1])


def test_the_same_seed_gives_the_same_scene_whatever_came_before():
    augmentor = Augmentor(section(SAMPLING, FLIP, TURN, SCALE), CLASSES, line_of_cars(40))
    results = []
    for _ in range(2):
        np.random.seed(3)
        results.append(augmentor(*scene()))
        augmentor(*scene(seed=2))
        augmentor = pickle.loads(pickle.dumps(augmentor))  # as it travels to a loader worker
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_disabled_augmentations_do_nothing():
    everything = section(SAMPLING, FLIP, TURN, SCALE)
    names = [step["NAME"] for step in everything["AUG_CONFIG_LIST"]]
    np.random.seed(0)
    hooked = Augmentor(everything, CLASSES, line_of_cars(3)).without(names)
    listed = Augmentor({**everything, "DISABLE_AUG_LIST": names}, CLASSES)
    for augmentor in (hooked, listed, Augmentor({}, CLASSES)):
        points, boxes, _ = augmentor(POINTS, BOXES, NAMES)
        np.testing.assert_array_equal(points, POINTS)
        np.testing.assert_allclose(boxes, BOXES)


def test_the_section_may_be_the_list_alone():
    """As in OpenPCDet's older files."""
    assert [step.NAME for step in Augmentor([FLIP, TURN], CLASSES).steps] == [
        "random_world_flip",
        "random_world_rotation",
    ]


def test_without_leaves_the_rest_and_the_augmentor_itself():
    augmentor = Augmentor(section(SAMPLING, FLIP, TURN), CLASSES, line_of_cars(3))
    rest = augmentor.without(["gt_sampling", "random_world_scaling"])
    assert [step.NAME for step in rest.steps] == ["random_world_flip", "random_world_rotation"]
    assert len(augmentor.steps) == 3


def test_sampling_fills_up_to_the_number_of_the_whole_scene():
    np.random.seed(0)
    away = np.array([[-30.0, 0, -1, 4, 1.6, 1.5, 0]] * 2)
    cars = np.array(["Car", "Van"])
    for limit, added in ((True, 14), (False, 15)):
        _, boxes, names = sampler(line_of_cars(40), LIMIT_WHOLE_SCENE=limit)(POINTS, away, cars)
        assert len(boxes) == 2 + added
        assert names.tolist() == ["Car", "Van"] + ["Car"] * added
        assert len(np.unique(boxes[2:, 1])) == added  # none of them twice


def test_sampling_gives_what_there_is_where_there_are_fewer():
    np.random.seed(0)
    _, boxes, _ = sampler(line_of_cars(4))(POINTS, BOXES[:0], NAMES[:0])
    assert sorted(boxes[:, 1]) == [0, 10, 20, 30]


def test_a_class_of_which_none_was_found_adds_none():
    database = line_of_cars(2)
    nobody = Database(("Car", "Pedestrian"), database.labels, database.boxes, database.ends, database.points)
    np.random.seed(0)
    assert sampler(nobody)(POINTS, BOXES[:0], NAMES[:0])[2].tolist() == ["Car", "Car"]


def test_each_sample_draws_from_all_objects():
    np.random.seed(0)
    drawn = [sampler(line_of_cars(8), SAMPLE_GROUPS=["Car:2"])(POINTS, BOXES[:0], NAMES[:0])[1] for _ in range(400)]
    _, times = np.unique(np.concatenate(drawn)[:, 1], return_counts=True)
    assert len(times) == 8 and times.min() > 70 and times.max() < 130  # 100 each, 8.7 is one sigma


def test_an_object_brings_its_points_and_takes_the_place_of_what_was_there():
    np.random.seed(0)
    there = np.array([[20, 0, -1, 0.5], [21.9, 0.7, -0.3, 0.5], [22.1, 0, -1, 0.5], [20, 0, 0.5, 0.5]], np.float32)
    points, boxes, _ = sampler(line_of_cars(1))(there, BOXES[:0], NAMES[:0])
    np.testing.assert_allclose(boxes, [[20, 0, -1, 4, 1.6, 1.5, 0]])
    own = [[20, 0.1, -0.8, 0.01], [20.5, 0.1, -0.8, 0.01], [21, 0.1, -0.8, 0.01]]
    np.testing.assert_allclose(points, [*own, *there[2:]], atol=1e-6)
    points, _, _ = sampler(line_of_cars(1), REMOVE_EXTRA_WIDTH=[0.3, 0.0, 0.0])(there, BOXES[:0], NAMES[:0])
    np.testing.assert_allclose(points, [*own, there[3]], atol=1e-6)  # 22.1 is within 20 + (4 + 0.3) / 2


def test_an_object_that_would_stand_on_another_is_dropped():
    np.random.seed(0)
    van = np.array([[20.0, 8.0, -1.0, 4.0, 2.5, 1.5, 0.0]])  # 6.75 to 9.25 in y; the car at 10 begins at 9.2
    _, boxes, _ = sampler(line_of_cars(3))(POINTS, van, np.array(["Van"]))
    assert sorted(boxes[1:, 1]) == [0, 20]


def test_of_two_drawn_objects_that_overlap_neither_comes():
    """As in OpenPCDet."""
    np.random.seed(0)
    _, boxes, names = sampler(line_of_cars(3, apart=1.0))(POINTS, BOXES, NAMES)
    np.testing.assert_array_equal(boxes, BOXES)
    assert names.tolist() == ["Car"]


@pytest.mark.parametrize("slope", [0.0, 0.05])
def test_use_road_plane_stands_objects_on_the_ground(slope):
    np.random.seed(0)
    ground = np.random.uniform(-40, 40, (20000, 4)).astype(np.float32)
    ground[:, 2] = -1.7 + slope * ground[:, 0] + np.abs(np.random.normal(0, 0.02, 20000))
    wall = np.random.uniform(0, 1, (3000, 4)).astype(np.float32) * [1, 40, 3, 1] + [25, -20, -1, 0]
    scene_points = np.concatenate([ground, wall.astype(np.float32)])
    points, boxes, _ = sampler(line_of_cars(2), USE_ROAD_PLANE=True)(scene_points, BOXES[:0], NAMES[:0])
    np.testing.assert_allclose(boxes[:, 2], -1.7 + slope * 20 + 0.75, atol=0.03)
    np.testing.assert_allclose(points[:6, 2], boxes[0, 2] + 0.2, atol=0.03)  # 0.2 above the centre, as in its frame


def test_without_ground_in_sight_objects_keep_their_height():
    np.random.seed(0)
    for few in (POINTS, POINTS[:0]):
        _, boxes, _ = sampler(line_of_cars(2), USE_ROAD_PLANE=True)(few, BOXES[:0], NAMES[:0])
        np.testing.assert_array_equal(boxes[:, 2], [-1, -1])


def test_boxes_overlap_exactly_if_they_share_area():
    """Against the corners of finely sampled rectangles, and cases by hand."""
    square = [0, 0, 0, 2, 2, 1, 0]
    cases = [
        ([2, 0, 0, 2, 2, 1, 0], False),  # touches a side
        ([2, 2, 0, 2, 2, 1, 0], False),  # touches a corner
        ([1.999, 0, 9, 2, 2, 1, 0], True),  # height does not matter
        ([0, 0, 0, 0.1, 0.1, 1, 1], True),  # inside
        ([2.3, 0, 0, 2, 2, 1, np.pi / 4], True),  # its corner reaches in: 2.3 - sqrt 2 < 1
        ([2.5, 0, 0, 2, 2, 1, np.pi / 4], False),  # 2.5 - sqrt 2 > 1
        ([2, 2, 0, 2, 2, 1, np.pi / 4], False),  # axis-aligned hulls overlap, the squares do not: 2 sqrt 2 > 1 + sqrt 2
    ]
    others = np.array([other for other, _ in cases])
    assert overlaps(np.array([square]), others)[0].tolist() == [expected for _, expected in cases]
    assert overlaps(others, np.array([square]))[:, 0].tolist() == [expected for _, expected in cases]


def test_overlaps_agrees_with_points_spread_over_the_boxes():
    _, boxes, _ = scene(num_boxes=40)
    boxes[:, :2] /= 3
    boxes[:, 2] = 0
    for i, box in enumerate(boxes):
        fractions = np.stack(np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 60)), -1).reshape(-1, 2)
        corner = corners(box[None])[0, :, :2]
        grid = corner[0] + fractions[:, :1] * (corner[1] - corner[0]) + fractions[:, 1:] * (corner[3] - corner[0])
        grid = np.column_stack([grid, np.zeros(len(grid))])
        shared = points_in_boxes(grid, boxes).sum(1)
        found = overlaps(box[None], boxes)[0]
        assert found[shared > 0].all(), i
        smaller = boxes.copy()
        smaller[:, 3:5] *= 0.9
        assert not (overlaps(box[None], smaller)[0] & (shared == 0)).any(), i


def test_gt_sampling_without_a_database_says_what_makes_it():
    with pytest.raises(TaskError, match=r"Augmentor\.of"):
        Augmentor(section(SAMPLING), CLASSES)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (section({**FLIP, "ALONG_AXES_LIST": ["x"]}), r"AUG_CONFIG_LIST\[0\]\.ALONG_AXES_LIST.*mean.*ALONG_AXIS_LIST"),
        (
            section(FLIP, {**TURN, "NAME": "random_world_rotate"}),
            r"LIST\[1\]\.NAME.*did you mean random_world_rotation",
        ),
        (section({"ALONG_AXIS_LIST": ["x"]}), r"AUG_CONFIG_LIST\[0\]\.NAME is missing"),
        (section({**FLIP, "ALONG_AXIS_LIST": ["z"]}), r"ALONG_AXIS_LIST.* x, y"),
        (section({**SCALE, "WORLD_SCALE_RANGE": [1.05, 0.95]}), r"WORLD_SCALE_RANGE.*least, most"),
        (section({**SCALE, "WORLD_SCALE_RANGE": [0.95]}), r"WORLD_SCALE_RANGE.*a list of 2"),
        (section({**TURN, "WORLD_ROT_ANGLE": "much"}), r"WORLD_ROT_ANGLE.*a number"),
        (section(3), r"AUG_CONFIG_LIST\.0 is 3, but it must be a mapping"),
        (section(FLIP, DISABLE_AUG_LIST=["gt_sample"]), r"DISABLE_AUG_LIST.*did you mean gt_sampling"),
        (section(FLIP, DISABLE_LIST=[]), r"DATA_CONFIG\.DATA_AUGMENTOR\.DISABLE_LIST is unknown"),
        (section(SAMPLING, SAMPLING), r"gt_sampling twice"),
        (section({**SAMPLING, "SAMPLE_GROUPS": ["Car"]}), r"SAMPLE_GROUPS.*Class:count"),
        (section({**SAMPLING, "SAMPLE_GROUPS": ["Carr:15"]}), r"SAMPLE_GROUPS: 'Carr' is unknown; did you mean Car"),
        (section({**SAMPLING, "SAMPLE_GROUPS": ["Car:15", "Car:2"]}), r"names a class twice"),
        (section({**SAMPLING, "PREPARE": {"filter_by_min_point": []}}), r"PREPARE\.filter_by_min_point.*min_points"),
        (section({**SAMPLING, "NUM_POINT_FEATURES": 5}), r"NUM_POINT_FEATURES is 5"),
    ],
)
def test_a_wrong_key_is_named_with_what_was_meant(options, told):
    with pytest.raises(ConfigError, match=told):
        Augmentor(options, CLASSES, line_of_cars(1))


def test_the_hook_may_not_name_an_unknown_augmentation():
    with pytest.raises(ConfigError, match="DISABLE_AUG_LIST: 'world_flip' is unknown; did you mean random_world_flip"):
        Augmentor(section(FLIP), CLASSES).without(["world_flip"])


def test_classes_that_are_not_trained_are_not_sampled():
    """As in OpenPCDet: CLASS_NAMES may be cut down and the rest of the file left."""
    np.random.seed(0)
    augmentor = Augmentor(section({**SAMPLING, "SAMPLE_GROUPS": ["Car:2", "Cyclist:3"]}), ["Car"], line_of_cars(3))
    assert augmentor(POINTS, BOXES, NAMES)[2].tolist() == ["Car", "Car"]
