"""Simulated scenes: what is cast, what is labelled, and that both are always the same bits."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from raytrain.cli import main
from raytrain.errors import ConfigError, DataError
from raytrain.tasks.pointpillars.frames import Frame, corners, points_in_boxes
from raytrain.tasks.pointpillars.kitti import KittiSource
from raytrain.tasks.pointpillars.raycast import look, scan_of
from raytrain.tasks.pointpillars.scenes import KINDS, LABELS, SENSOR_HEIGHT_M, Scene, draw_scene, solids_of
from raytrain.tasks.pointpillars.simulate import (
    CALIBRATION,
    SimulatedSource,
    SimulationOptions,
    labelled,
    outlines,
    simulation_options,
    sweep,
    with_view,
    write_scenes,
)

SMALL = SimulationOptions(BEAMS=32, AZIMUTH_STEP_DEG=0.5, FIELD_OF_VIEW_DEG=90.0)
NOTHING = {key: [0, 0] for key in KINDS}
IDEAL = {"DROPOUT": 0.0, "RANGE_NOISE_M": 0.0, "ROUGHNESS_M": 0.0, "SLOPE": 0.0}
NUMBER = {label: number for number, label in enumerate(LABELS)}
SIZES = {label: KINDS[key].size for label, key in zip(LABELS, KINDS, strict=True)}


def source(split: str = "train", seed: int = 0, options: SimulationOptions = SMALL) -> SimulatedSource:
    return SimulatedSource(options, split, seed)


def assert_equal(one: Frame, other: Frame) -> None:
    """To the bit, but for how much room the names' text has."""
    assert one.name == other.name
    assert one.points.dtype == other.points.dtype == np.float32
    assert one.points.tobytes() == other.points.tobytes()
    assert one.boxes.tobytes() == other.boxes.tobytes()
    assert one.annotations.names.tolist() == other.annotations.names.tolist()
    for field in ("truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y"):
        mine, theirs = getattr(one.annotations, field), getattr(other.annotations, field)
        assert mine.dtype == theirs.dtype == np.float64
        assert mine.tobytes() == theirs.tobytes(), field
    for matrix in ("P2", "R0_rect", "Tr_velo_to_cam"):
        assert np.array_equal(getattr(one.calibration, matrix), getattr(other.calibration, matrix))


def scene_of(*objects: tuple[str, float, float, float]) -> Scene:
    """On flat ground, of a usual size each: label, x, y, heading."""
    sizes = np.array([SIZES[label] for label, *_ in objects])
    place = np.array([[x, y] for _, x, y, _ in objects])
    headings = [heading for *_, heading in objects]
    boxes = np.column_stack([place, sizes[:, 2] / 2 - SENSOR_HEIGHT_M, sizes, headings])
    kinds = np.array([NUMBER[label] for label, *_ in objects])
    return Scene(kinds, boxes, np.ones(len(kinds)), np.zeros(2))


def frame_of(scene: Scene, options: SimulationOptions) -> Frame:
    random = np.random.default_rng(0)
    scene, annotations = labelled(scene)
    points, owner, hidden = sweep(scene, options, random)
    return Frame("000000", points, with_view(annotations, scene, points, owner, hidden), CALIBRATION)


# The same bits


def test_a_scene_is_the_same_bits_whoever_asks_and_in_whatever_order():
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    one, other = source(), source()
    later = one.frame(3)
    assert_equal(one.frame(0), other.frame(0))
    np.random.random(3)
    other.frame(1)
    assert_equal(other.frame(3), later)
    np.random.set_state(("MT19937", state, 624, 0, 0.0))
    one.frame(2)
    assert np.array_equal(np.random.get_state()[1], state)


def test_seed_split_and_number_each_make_another_scene():
    frames = [source().frame(0), source().frame(1), source(seed=1).frame(0), source("val").frame(0)]
    for one, other in combinations(frames, 2):
        assert one.points.tobytes() != other.points.tobytes()
        assert not np.array_equal(one.annotations.location, other.annotations.location)


def test_how_many_scenes_there_are_changes_none_of_them():
    more = simulation_options({"NUM_SCENES": {"train": 5000}, "BEAMS": 32, "AZIMUTH_STEP_DEG": 0.5})
    fewer = simulation_options({"NUM_SCENES": {"train": 2}, "BEAMS": 32, "AZIMUTH_STEP_DEG": 0.5})
    assert (len(source(options=more)), len(source(options=fewer))) == (5000, 2)
    assert_equal(source(options=more).frame(1), source(options=fewer).frame(1))
    with pytest.raises(IndexError, match="scene 2 of 2 in split train"):
        source(options=fewer).frame(2)


def test_scenes_written_as_kitti_has_them_are_read_back_to_the_bit(tmp_path):
    options = SMALL.model_copy(update={"NUM_SCENES": type(SMALL.NUM_SCENES)(train=8, val=3)})
    assert write_scenes(tmp_path, options, ("train", "val"), seed=7) == {"train": 8, "val": 3}
    for split in ("train", "val"):
        simulated, read = source(split, 7, options), KittiSource(tmp_path, split)
        assert len(read) == len(simulated)
        for index in range(len(read)):
            assert_equal(simulated.frame(index), read.frame(index))


def test_a_scene_without_a_label_is_read_back_too(tmp_path):
    options = simulation_options({**NOTHING, "NUM_SCENES": {"train": 1, "val": 0}, "BEAMS": 8})
    assert write_scenes(tmp_path, options, ("train", "val"), seed=0) == {"train": 1}
    assert_equal(source(options=options).frame(0), KittiSource(tmp_path, "train").frame(0))
    assert not (tmp_path / "ImageSets" / "val.txt").exists()


# What the scanner sees


def test_on_flat_empty_ground_each_beam_below_the_horizon_is_a_circle_of_echoes():
    options = SimulationOptions(**NOTHING, **IDEAL, BEAMS=16, ELEVATION_DEG=[-15.0, 0.0], AZIMUTH_STEP_DEG=1.0)
    frame = source(options=options).frame(0)
    distances = SENSOR_HEIGHT_M / np.sin(np.radians(np.arange(15.0, 0.0, -1.0)))
    within = distances[distances <= options.MAX_RANGE_M]  # that of 1 degree, 99 m, is too far
    assert (len(within), len(frame.points)) == (14, 14 * 360)
    assert np.abs(frame.points[:, 2] + SENSOR_HEIGHT_M).max() < 1e-3
    found = np.linalg.norm(frame.points[:, :3].astype(np.float64), axis=1)
    assert np.abs(found.reshape(14, 360) - within[:, None]).max() < 2e-3


def test_range_noise_is_along_the_ray_and_as_large_as_told():
    options = SimulationOptions(**NOTHING, **{**IDEAL, "RANGE_NOISE_M": 0.05})
    points = source(options=options).frame(0).points[:, :3].astype(np.float64)
    distance = np.linalg.norm(points, axis=1)
    error = distance - SENSOR_HEIGHT_M / (-points[:, 2] / distance)
    assert error[distance < 10].std() == pytest.approx(0.05, rel=0.03)


def test_echoes_are_lost_far_away_and_aslant_and_where_there_is_glass():
    every = source(options=SimulationOptions(**{**IDEAL, "SLOPE": 0.02}, NUM_SCENES={"train": 3})).frame(0)
    some = source(options=SimulationOptions(**{**IDEAL, "SLOPE": 0.02, "DROPOUT": 0.05})).frame(0)

    def returned(low: float, high: float) -> float:
        near = [np.hypot(*frame.points[:, :2].T) for frame in (some, every)]
        return np.mean((near[0] >= low) & (near[0] < high)) * len(near[0]) / ((near[1] >= low) & (near[1] < high)).sum()

    assert 0.6 < returned(40, 80) < returned(15, 40) < returned(0, 8) < 0.97


def test_reflectance_is_in_hundredths_and_falls_with_the_angle():
    points = source(options=SimulationOptions()).frame(0).points
    hundredths = points[:, 3].astype(np.float64) * 100
    assert np.abs(hundredths - np.round(hundredths)).max() < 1e-5
    assert hundredths.min() >= 0 and hundredths.max() <= 99
    empty = source(options=SimulationOptions(**NOTHING, SLOPE=0.0)).frame(0).points
    distance = np.hypot(*empty[:, :2].T)
    assert empty[distance < 5, 3].mean() > 1.2 * empty[distance > 30, 3].mean()


def inside(solids, points):
    """(N, S): which points (N, 3) lie in which solid, by each shape's own formula."""
    offset = points[:, None] - solids.centre
    cos, sin = np.cos(solids.heading), np.sin(solids.heading)
    along, across = offset[..., 0] * cos + offset[..., 1] * sin, offset[..., 1] * cos - offset[..., 0] * sin
    up = offset[..., 2]
    within = np.abs(up) <= solids.half[:, 2]
    flat = within & (np.abs(along) <= solids.half[:, 0] - solids.taper[:, 0] * up)
    flat &= np.abs(across) <= solids.half[:, 1] - solids.taper[:, 1] * up
    squared = (solids.curved * np.stack([along, across, up], -1) ** 2).sum(-1)
    return np.where(solids.curved.any(1), within & (squared <= 1), flat)


def test_a_ray_ends_where_it_first_meets_something_and_nowhere_before():
    """Against walking along each ray in steps of 10 cm, in scenes crowded near the sensor, all around it."""
    counts = {
        "CARS": [4, 4],
        "VANS": [1, 1],
        "PEDESTRIANS": [3, 3],
        "CYCLISTS": [2, 2],
        "POLES": [2, 2],
        "WALLS": [1, 1],
    }
    scene = draw_scene(counts, [-16, -16, 16, 16], 0.02, np.random.default_rng(2))
    solids, scan = solids_of(scene), scan_of(9, (-18, 2), 3.0, 360, 0.3)
    view = look(scan, solids, len(scene.boxes), scene.slope, SENSOR_HEIGHT_M)
    beam, azimuth = np.divmod(np.arange(scan.num_rays), len(scan.cos))
    ray = np.column_stack([scan.cos[azimuth], scan.sin[azimuth], scan.tan[beam]])
    hit = np.flatnonzero(view.solid >= 0)
    assert len(hit) > 120 and len(np.unique(scene.kinds[solids.owner[view.solid[hit]]])) == len(KINDS)
    just = [inside(solids, ray[hit] * (view.t[hit] + shift)[:, None]) for shift in (-1e-6, 1e-6)]
    assert not just[0].any()
    assert just[1][np.arange(len(hit)), view.solid[hit]].mean() > 0.99  # but for rays that touch an edge
    assert (view.facing[hit] >= 0).all() and (view.facing[hit] <= 1 + 1e-9).all()
    for start in range(3, 24):
        t = np.arange(start, start + 1, 0.1)
        walked = np.flatnonzero(view.t > start)
        places = ray[walked, None] * np.minimum(t, view.t[walked, None] - 1e-6)[..., None]
        assert not inside(solids, places.reshape(-1, 3)).any()


def test_a_sector_is_the_middle_of_a_whole_turn():
    whole = {"BEAMS": 16, "AZIMUTH_STEP_DEG": 0.5, **IDEAL}
    sector = source(options=SimulationOptions(**whole, FIELD_OF_VIEW_DEG=90.0)).frame(4)
    turn = source(options=SimulationOptions(**whole)).frame(4)
    azimuth = np.degrees(np.arctan2(turn.points[:, 1], turn.points[:, 0]))
    assert np.abs(np.degrees(np.arctan2(sector.points[:, 1], sector.points[:, 0]))).max() < 45.01
    inner = turn.points[np.abs(azimuth) < 44.9]
    same = {point.tobytes() for point in sector.points[:, :3]} & {point.tobytes() for point in inner[:, :3]}
    assert len(same) > 0.98 * len(inner)
    assert sector.annotations.names.tolist() == turn.annotations.names.tolist()
    assert np.array_equal(sector.boxes, turn.boxes)


# What stands there


def test_objects_stand_on_the_ground_apart_from_each_other_and_in_the_numbers_asked_for():
    options = SimulationOptions(CARS=[3, 9])
    cars = set()
    for number in range(12):
        scene = draw_scene(options.counts, options.EXTENT_M, 0.02, np.random.default_rng(number))
        cars.add(int((scene.kinds == NUMBER["Car"]).sum()))
        bottom = scene.boxes[:, 2] - scene.boxes[:, 5] / 2
        assert np.allclose(bottom, (scene.boxes[:, :2] * scene.slope).sum(1) - SENSOR_HEIGHT_M)
        tall = scene.boxes.copy()
        tall[:, 2], tall[:, 5] = 0, 1
        shares = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 2), -1).reshape(-1, 2)
        corner, _, far, _ = np.moveaxis(corners(tall)[:, :4, :2], 1, 0)
        side = corners(tall)[:, 1, :2] - corner
        grid = corner[:, None] + shares[:, :1] * side[:, None] + shares[:, 1:] * (far - corner - side)[:, None]
        points = np.concatenate([grid, np.zeros((*grid.shape[:2], 1))], axis=-1).reshape(-1, 3)
        owner = np.repeat(np.arange(len(tall)), len(shares))
        met, point = np.nonzero(points_in_boxes(points, tall))
        assert (met == owner[point]).mean() == 1
        assert np.hypot(*points[:, :2].T).min() > 3
    assert cars <= set(range(3, 10)) and len(cars) > 3


def test_nine_in_ten_points_of_an_object_lie_in_its_box_and_its_shape_reaches_the_sides():
    random = np.random.default_rng(0)
    for label in ("Car", "Van", "Pedestrian", "Cyclist"):
        scene, _ = labelled(scene_of((label, 9.0, 1.0, 0.7)))
        points, owner, _ = sweep(scene, SimulationOptions(), random)
        mine = points[owner == 0]
        assert points_in_boxes(mine, scene.boxes).mean() > 0.9
        x, y, z = (mine[:, :3] - scene.boxes[0, :3]).T.astype(np.float64)
        along = x * np.cos(scene.boxes[0, 6]) + y * np.sin(scene.boxes[0, 6])
        assert np.ptp(along) > 0.5 * scene.boxes[0, 3] and np.ptp(z) > 0.9 * scene.boxes[0, 5]


def test_a_car_has_fewer_points_the_farther_it_is_and_the_coarser_the_scan():
    def points_at(distance: float, **options: object) -> int:
        frame = frame_of(scene_of(("Car", distance, 0.0, 0.3)), SimulationOptions(**options))
        return int(points_in_boxes(frame.points, frame.boxes).sum())

    counts = [points_at(distance) for distance in (10, 20, 30, 40)]
    assert counts[0] > 800 and counts == sorted(counts, reverse=True) and 30 < counts[3] < 120
    assert points_at(20, BEAMS=32, AZIMUTH_STEP_DEG=0.4) == pytest.approx(counts[1] / 4, rel=0.3)


# Labels


def test_labels_hold_two_decimals_and_the_boxes_follow_from_them():
    for index in range(5):
        found = source().frame(index).annotations
        assert set(found.names) <= {"Car", "Van", "Pedestrian", "Cyclist"}
        for field in ("truncated", "alpha", "bbox", "dimensions", "location", "rotation_y"):
            for value in getattr(found, field).ravel():
                assert value == float(f"{value:.2f}") and str(value) != "-0.0"
        assert set(found.occluded) <= {0, 1, 2}
        assert (np.abs(found.alpha) <= 3.15).all() and (np.abs(found.rotation_y) <= 3.15).all()
        assert (found.bbox[:, 2:] > found.bbox[:, :2]).all() and (found.bbox >= 0).all()


def test_a_label_is_what_one_works_out_by_hand():
    found = frame_of(scene_of(("Van", 20.27, 0.0, 0.0)), SMALL).annotations
    length, width, height = SIZES["Van"]
    assert found.names.tolist() == ["Van"] and found.dimensions.tolist() == [[length, height, width]]
    assert found.location.tolist() == [[0.0, round(SENSOR_HEIGHT_M - 0.08, 2), 20.0]]
    assert (found.rotation_y.tolist(), found.alpha.tolist()) == ([-1.57], [-1.57])
    near = 20 - length / 2  # of its back, which is before the rest of it
    left, right = (609.5593 + side * 721.5377 * width / 2 / near for side in (-1, 1))
    top, bottom = (172.854 + 721.5377 * y / near for y in (1.65 - height, 1.65))
    assert np.abs(found.bbox - [[left, top, right, bottom]]).max() < 0.2  # -1.57 is not quite a right angle
    assert (found.truncated.tolist(), found.occluded.tolist()) == ([0.0], [0.0])


def test_what_a_van_hides_is_occluded_the_more_the_farther_it_covers_it():
    free = frame_of(scene_of(("Van", 15.0, 4.0, 0.0), ("Car", 25.0, 0.0, 0.0)), SMALL).annotations
    assert free.occluded.tolist() == [0, 0]
    half = frame_of(scene_of(("Van", 15.0, 1.0, 0.0), ("Car", 25.0, 0.0, 0.0)), SMALL).annotations
    assert half.names.tolist() == ["Van", "Car"] and half.occluded.tolist() == [0, 1]
    most = frame_of(scene_of(("Van", 15.0, 0.65, 0.0), ("Car", 25.0, 0.0, 0.0)), SMALL).annotations
    assert most.occluded.tolist() == [0, 2]
    behind = frame_of(scene_of(("Van", 15.0, 0.0, 0.0), ("Car", 25.0, 0.0, 0.0)), SMALL).annotations
    assert behind.names.tolist() == ["Van"]  # not a point of the car is left


def test_truncated_is_the_share_of_the_outline_outside_of_the_image():
    scene = scene_of(("Car", 20.27, -20 * (1241 - 609.5593) / 721.5377, 0.0))
    bbox, truncated = outlines(scene.boxes)
    assert bbox[0, 2] == 1241 and 0.35 < truncated[0] < 0.65
    camera = CALIBRATION.to_camera(corners(scene.boxes)[0])
    u = 609.5593 + 721.5377 * camera[:, 0] / camera[:, 2]
    assert truncated[0] == pytest.approx((u.max() - 1241) / (u.max() - u.min()))
    assert outlines(scene_of(("Car", 20.0, 0.0, 0.0)).boxes)[1][0] == pytest.approx(0)
    assert outlines(scene_of(("Van", 2.0, 3.5, 0.0)).boxes)[1][0] > 0.8  # reaches behind the camera


def test_what_the_camera_does_not_see_is_cast_but_not_labelled():
    behind, beside, ahead = ("Car", -12.0, 0.0, 0.0), ("Cyclist", 4.0, 12.0, 0.0), ("Pedestrian", 12.0, 0.0, 0.0)
    scene = scene_of(behind, beside, ahead)
    frame = frame_of(scene, SimulationOptions())
    assert frame.annotations.names.tolist() == ["Pedestrian"]
    assert (points_in_boxes(frame.points, scene.boxes).sum(1) > 50).all()


# Options and the command line


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"BEEMS": 32},
            "DATA_CONFIG.SIMULATION.BEEMS is unknown (found 32); did you mean DATA_CONFIG.SIMULATION.BEAMS?",
        ),
        ({"BEAMS": 0}, "DATA_CONFIG.SIMULATION.BEAMS is 0, but it must be a whole number >= 1"),
        ({"CARS": [5, 2]}, "DATA_CONFIG.SIMULATION.CARS is [5, 2], but it must be [least, most]"),
        ({"CARS": 5}, "DATA_CONFIG.SIMULATION.CARS is 5, but it must be a list of 2 values, each a whole number >= 0"),
        ({"ELEVATION_DEG": [2.0, -24.9]}, "but it must be [lowest, highest]"),
        ({"EXTENT_M": [70.0, -40.0, 0.0, 40.0]}, "but it must be [x0, y0, x1, y1]"),
        ({"NUM_SCENES": {"test": 3}}, "DATA_CONFIG.SIMULATION.NUM_SCENES.test is unknown"),
    ],
)
def test_options_that_cannot_be_are_named(found, message):
    with pytest.raises(ConfigError) as caught:
        simulation_options(found)
    assert message in str(caught.value)


CONFIG = """\
TASK: raytrain.tasks.digits:DigitsTask
SEED: 3
OPTIMIZATION: {BATCH_SIZE_PER_GPU: 4, NUM_EPOCHS: 2}
DATA_CONFIG: {SIMULATION: {NUM_SCENES: {train: 2, val: 1}, BEAMS: 16, AZIMUTH_STEP_DEG: 1.0}}
"""


def test_the_command_writes_the_scenes_that_a_config_would_train_on(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(CONFIG)
    out = tmp_path / "scenes"
    assert main(["simulate", str(out), "--cfg_file", str(tmp_path / "run.yaml")]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 2 scenes of train and 1 scenes of val\n")
    options = simulation_options({"NUM_SCENES": {"train": 2, "val": 1}, "BEAMS": 16, "AZIMUTH_STEP_DEG": 1.0})
    for split in ("train", "val"):
        simulated, read = source(split, 3, options), KittiSource(out, split)
        assert len(read) == len(simulated)
        assert_equal(simulated.frame(len(read) - 1), read.frame(len(read) - 1))


def test_without_a_config_set_takes_the_keys_of_the_simulation(tmp_path):
    words = f"simulate {tmp_path} --split val --scenes 2 --seed 5 --set BEAMS 8 AZIMUTH_STEP_DEG 1.0 CARS 1,2"
    assert main(words.split()) == 0
    assert [path.name for path in (tmp_path / "ImageSets").iterdir()] == ["val.txt"]
    expected = simulation_options({"BEAMS": 8, "AZIMUTH_STEP_DEG": 1.0, "CARS": [1, 2]})
    assert_equal(source("val", 5, expected).frame(1), KittiSource(tmp_path, "val").frame(1))


def test_scenes_are_not_written_over_others_nor_where_there_is_no_folder(tmp_path):
    options = simulation_options({**NOTHING, "NUM_SCENES": {"train": 1, "val": 1}, "BEAMS": 4})
    write_scenes(tmp_path, options, ("train",), seed=0)
    write_scenes(tmp_path, options, ("val",), seed=0)
    with pytest.raises(DataError, match=r"ImageSets/train\.txt is there already; name another folder"):
        write_scenes(tmp_path, options, ("train",), seed=0)
    Path(tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        write_scenes(tmp_path / "file", options, ("train",), seed=0)


def test_no_scenes_at_all_is_an_error_and_leaves_nothing(tmp_path):
    options = simulation_options({"NUM_SCENES": {"train": 0, "val": 0}})
    with pytest.raises(DataError, match="nothing to write: NUM_SCENES is 0 for train and val; ask for some with"):
        write_scenes(tmp_path / "scenes", options, ("train", "val"), seed=0)
    assert not (tmp_path / "scenes").exists()


def test_a_key_without_its_value_is_named_beside_scenes_too(tmp_path, capsys):
    assert main(f"simulate {tmp_path / 'scenes'} --scenes 1 --set BEAMS".split()) == 2
    assert "--set: BEAMS has no value" in capsys.readouterr().err


def test_a_scene_without_a_point_which_could_not_be_read_back_is_not_written(tmp_path):
    options = simulation_options({**NOTHING, "NUM_SCENES": {"train": 1, "val": 0}, "BEAMS": 4, "MAX_RANGE_M": 0.5})
    with pytest.raises(DataError, match=r"scene 000000 has no point, .*MAX_RANGE_M or DROPOUT leaves none"):
        write_scenes(tmp_path, options, ("train",), seed=0)
    assert not list(tmp_path.iterdir())
