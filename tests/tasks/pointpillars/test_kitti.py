"""KITTI's files: what is read, written and refused. Numbers of the genuine frames are worked out here by hand."""

import subprocess
import sys

import numpy as np
import pytest
from kitti_frames import CALIBRATION, assert_same_bits, kitti_mini, made_up_frame, write_kitti

from raytrain.errors import DataError
from raytrain.tasks.pointpillars.frames import Annotations, points_in_boxes
from raytrain.tasks.pointpillars.kitti import (
    KittiSource,
    difficulty_of,
    files_of,
    read_calibration,
    read_labels,
    write_calibration,
    write_labels,
    write_split,
)

INDEX = "raytrain_index_train.npz"


def test_the_first_car_of_frame_000008_is_where_its_calibration_puts_it(tmp_path):
    frame = KittiSource(kitti_mini(tmp_path), "train").frame(2)
    # Label: Car 0.88 3 -0.69 0.00 192.37 402.31 374.00 1.60 1.57 3.23 -2.70 1.74 3.68 -1.29
    # R0_rect is a rotation, so its transpose brings (-2.70, 1.74, 3.68) back into the unrectified camera:
    camera = [
        0.9999239 * -2.70 - 0.009869795 * 1.74 + 0.007402527 * 3.68,
        0.009837760 * -2.70 + 0.9999421 * 1.74 + 0.004351614 * 3.68,
        -0.007445048 * -2.70 - 0.004278459 * 1.74 + 0.9999631 * 3.68,
    ]  # (-2.6897, 1.7294, 3.6925)
    right, down, ahead = camera[0] + 0.004069766, camera[1] + 0.07631618, camera[2] + 0.2717806
    centre = [
        0.007533745 * right + 0.01480249 * down + 0.9998621 * ahead,
        -0.9999714 * right + 0.0007280733 * down + 0.007523790 * ahead,
        -0.0006166020 * right - 0.9998902 * down + 0.01480755 * ahead + 1.60 / 2,  # the label's y is the bottom
    ]  # (3.970, 2.717, -0.945)
    np.testing.assert_allclose(frame.boxes[0, :3], centre, atol=1e-5)
    np.testing.assert_allclose(frame.boxes[0, :3], [3.970, 2.717, -0.945], atol=1e-3)
    np.testing.assert_allclose(frame.boxes[0, 3:], [3.23, 1.57, 1.60, 1.29 - np.pi / 2], atol=1e-12)


def test_the_camera_sees_as_many_points_as_the_benchmarks_own_cut_kept(tmp_path):
    source = KittiSource(kitti_mini(tmp_path), "train")
    assert [len(source.frame(i).points) for i in range(3)] == [115_384, 120_268, 17_238]
    # Frame 000008 comes cut to the view, so all of its points must be in it.
    seen = [int(source.frame(i).calibration.in_view(source.frame(i).points).sum()) for i in range(3)]
    assert seen == [20_799, 18_630, 17_238]
    # By homogeneous coordinates, as the devkit's readme has them: y = P2 * R0_rect * Tr_velo_to_cam * x
    frame, to4 = source.frame(0), np.eye(4)[3]
    rotation = np.vstack([np.column_stack([frame.calibration.R0_rect, np.zeros(3)]), to4])
    lidar = np.column_stack([frame.points[:, :3], np.ones(len(frame.points))])
    u, v, depth = frame.calibration.P2 @ rotation @ np.vstack([frame.calibration.Tr_velo_to_cam, to4]) @ lidar.T
    ahead = depth > 0
    u, v = u[ahead] / depth[ahead], v[ahead] / depth[ahead]
    assert ((u >= 0) & (u < 1242) & (v >= 0) & (v < 375)).sum() == 20_799


def test_the_points_of_each_car_of_frame_000008_are_those_in_its_labelled_box(tmp_path):
    source = KittiSource(kitti_mini(tmp_path), "train")
    frame = source.frame(2)
    assert frame.annotations.names.tolist() == ["Car"] * 6 + ["DontCare"] * 4
    found = []
    for x, y, z, length, width, height, heading in frame.boxes[:6]:  # turned in the complex plane, heading towards 1
        flat = (frame.points[:, 0] - x + 1j * (frame.points[:, 1] - y)) * np.exp(-1j * heading)
        held = (abs(flat.real) <= length / 2) & (abs(flat.imag) <= width / 2)
        found.append(int((held & (abs(frame.points[:, 2] - z) <= height / 2)).sum()))
    assert found == [1325, 1900, 881, 659, 55, 162]  # all have the 10 that a detector needs
    assert points_in_boxes(frame.points, frame.boxes[:6]).sum(axis=1).tolist() == found
    far = source.frame(1)  # a truck, a car and a cyclist at 70, 61 and 46 m
    assert points_in_boxes(far.points, far.boxes[:3]).sum(axis=1).tolist() == [71, 9, 18]


def test_difficulty_is_the_devkits(tmp_path):
    source = KittiSource(kitti_mini(tmp_path), "train")
    # Occlusion 3, 1, 3, 1, 0, 0; truncation 0.88, 0, 0.34, 0, 0, 0; the fifth is 39.60 pixels high, the sixth 61.87.
    assert difficulty_of(source.annotations(2)).tolist() == [-1, 1, -1, 1, 1, 0, -1, -1, -1, -1]
    # A truck of 32.85 pixels, a car of 21.58, a cyclist of occlusion 3, and what nobody cares for.
    assert difficulty_of(source.annotations(1)).tolist() == [1, -1, -1, -1, -1, -1, -1]


def test_real_label_files_written_back_are_the_same_bytes(tmp_path):
    for path in sorted((kitti_mini(tmp_path) / "training" / "label_2").iterdir()):
        write_labels(tmp_path / path.name, read_labels(path))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_real_calibration_written_back_reads_as_the_same_bits(tmp_path):
    for path in sorted((kitti_mini(tmp_path) / "training" / "calib").iterdir()):
        write_calibration(tmp_path / path.name, read_calibration(path))
        written, real = read_calibration(tmp_path / path.name), read_calibration(path)
        assert all(value.tobytes() == vars(real)[name].tobytes() for name, value in vars(written).items())
        firsts = [line.split()[0] for line in path.read_text().splitlines() if line]
        assert [line.split()[0] for line in (tmp_path / path.name).read_text().splitlines()] == firsts


def test_a_written_frame_reads_back_as_the_same_bits(tmp_path):
    frames = [made_up_frame("000003", ("Car", "Van", "DontCare")), made_up_frame("000001", ())]
    source = KittiSource(write_kitti(tmp_path, frames), "train")
    assert (len(source), source.name(0), source.name(1)) == (2, "000003", "000001")
    for i, frame in enumerate(frames):
        assert_same_bits(source.frame(i), frame)


def test_numbers_of_two_decimals_and_a_calibration_of_any_bits_survive_the_file(tmp_path):
    draw = np.random.RandomState(0)
    table = np.round(np.concatenate([draw.uniform(-80, 80, (200, 14)), np.full((1, 14), -0.001)]), 2)
    columns = (table[:, 0], np.zeros(201), table[:, 2], table[:, 3:7], table[:, 7:10], table[:, 10:13], table[:, 13])
    write_labels(tmp_path / "labels.txt", Annotations(np.array(["Car"] * 201), *columns))
    back = read_labels(tmp_path / "labels.txt")
    assert all(value.tobytes() == vars(back)[name].tobytes() for name, value in zip(FIELDS, columns, strict=True))
    write_calibration(tmp_path / "calib.txt", CALIBRATION)
    made = type(CALIBRATION)(*(draw.randn(*value.shape) for value in vars(CALIBRATION).values()))
    write_calibration(tmp_path / "calib.txt", made)
    assert read_calibration(tmp_path / "calib.txt").P2.tobytes() == made.P2.tobytes()


FIELDS = ("truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")


def test_detections_keep_their_scores(tmp_path):
    frame = made_up_frame("000001")
    scored = Annotations(**{**vars(frame.annotations), "scores": np.array([0.25, 0.9375])})
    write_labels(tmp_path / "000001.txt", scored)
    back = read_labels(tmp_path / "000001.txt")
    assert back.scores is not None and back.scores.tolist() == [0.25, 0.9375]
    assert np.array_equal(back.location, scored.location)


GOOD = "Car 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57\n"
BAD_FILES = {
    "short": ("label_2", (GOOD + GOOD[:-6]).encode(), ":2: the line has 14 values; an object has 15"),
    "of three values": (
        "label_2",
        b"Car 0 0\n",
        ":1: the line has 3 values; an object has 15, or 16 with a score",
    ),
    "a word": ("label_2", GOOD.replace("1.87", "wide").encode(), ":1: the line has 'wide' where a number must be"),
    "infinite": ("label_2", (GOOD + GOOD.replace("58.49", "nan")).encode(), ":2: the line has 'nan' where a number"),
    "binary": ("label_2", b"\n" + bytes(range(200, 256)), ":2: the line is not text"),
    "half a matrix": ("calib", b"P2: 1 0 0 0 0 1\n", ":1: the line has 6 numbers for P2; it is a 3 x 4 matrix"),
    "singular": ("calib", b"\nR0_rect: 1 0 0 0 1 0 0 0 0\n", ":2: the line has a singular matrix R0_rect"),
    "no calibration": ("calib", b"P2: 1 0 0 0 0 1 0 0 0 0 1 0\n", " has no line R0_rect:"),
    "torn": ("velodyne", b"1234" * 7, " has 28 bytes; points take 16 each"),
    "empty": ("velodyne", b"", " has 0 bytes"),
    "missing": ("velodyne", None, " cannot be read: No such file or directory\nEvery frame of a split needs velodyne/"),
    "no label": ("label_2", None, " cannot be read: No such file or directory\n"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_an_error_that_names_frame_file_and_line(tmp_path, case):
    folder, content, told = BAD_FILES[case]
    write_kitti(tmp_path, [made_up_frame("000003"), made_up_frame("000007")])
    path = files_of(tmp_path, "000007")[folder]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        KittiSource(tmp_path, "train")
    assert str(error.value).startswith(f"frame 000007: {path}{told}")


def test_a_point_that_is_no_number_is_an_error_that_names_it(tmp_path):
    frame = made_up_frame("000003")
    frame.points[17, 2] = np.inf
    with pytest.raises(DataError, match=r"frame 000003: .*000003.bin: point 17 is .*inf"):
        KittiSource(write_kitti(tmp_path, [frame]), "train").frame(0)


def test_a_split_that_is_not_there_or_empty_says_which_and_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"(?s)ImageSets/val.txt cannot be read: .*DATA_CONFIG.DATA_PATH is the folder"):
        KittiSource(tmp_path, "val")
    write_split(tmp_path, "val", [])
    with pytest.raises(DataError, match=r"ImageSets/val.txt names no frame"):
        KittiSource(tmp_path, "val")


@pytest.mark.parametrize("line", ["../000003", "000003 000007", "0000\0", "/000003"])
def test_a_line_of_a_split_that_is_no_frames_name_is_an_error_that_names_it(tmp_path, line):
    path = write_kitti(tmp_path, [made_up_frame("000003")]) / "ImageSets" / "train.txt"
    path.write_text(f"000003\r\n\n{line}\n")
    with pytest.raises(DataError, match=r"ImageSets/train.txt:3: .* is no frame's name, as 000042 is"):
        KittiSource(tmp_path, "train")
    path.write_text("000003\r\n\n")
    assert len(KittiSource(tmp_path, "train")) == 1


def test_the_index_is_kept_and_a_changed_label_is_seen_all_the_same(tmp_path):
    root = write_kitti(tmp_path, [made_up_frame("000003"), made_up_frame("000007")])
    before = KittiSource(root, "train").frame(1)
    kept = (root / INDEX).stat().st_mtime_ns
    assert_same_bits(KittiSource(root, "train").frame(1), before)
    assert (root / INDEX).stat().st_mtime_ns == kept  # read, not made again
    label = files_of(root, "000007")["label_2"]
    label.write_text(label.read_text().replace("Pedestrian", "Pedestrain"))  # as many bytes as before
    assert KittiSource(root, "train").annotations(1).names.tolist() == ["Car", "Pedestrain"]
    write_split(root, "train", ["000007"])
    assert KittiSource(root, "train").annotations(0).names.tolist() == ["Car", "Pedestrain"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-40], lambda data: b"", lambda data: data.replace(b"Car", b"Cat")]
)
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    root = write_kitti(tmp_path, [made_up_frame("000003")])
    before = KittiSource(root, "train").frame(0)
    whole = (root / INDEX).read_bytes()
    torn = damage(whole.replace(b"C\0\0\0a\0\0\0r", b"C\0\0\0a\0\0\0t"))
    (root / INDEX).write_bytes(torn)
    assert_same_bits(KittiSource(root, "train").frame(0), before)
    assert (root / INDEX).read_bytes() == whole


def test_a_read_only_folder_is_read_without_an_index_and_left_as_it_is(tmp_path):
    root = write_kitti(tmp_path / "kitti", [made_up_frame("000003")])
    root.chmod(0o555)
    try:
        assert_same_bits(KittiSource(root, "train").frame(0), made_up_frame("000003"))
        assert sorted(path.name for path in root.iterdir()) == ["ImageSets", "training"]
    finally:
        root.chmod(0o755)


def test_where_the_index_cannot_be_written_the_frames_are_read_without_it(tmp_path):
    root = write_kitti(tmp_path, [made_up_frame("000003")])
    (root / INDEX).mkdir()
    assert_same_bits(KittiSource(root, "train").frame(0), made_up_frame("000003"))
    assert sorted(path.name for path in root.iterdir()) == ["ImageSets", INDEX, "training"]


def test_several_processes_may_make_the_index_at_once(tmp_path):
    root = write_kitti(tmp_path, [made_up_frame(f"{i:06}") for i in range(20)])
    program = (
        "import pathlib, sys; root = pathlib.Path(sys.argv[1])\n"
        "from raytrain.tasks.pointpillars.kitti import KittiSource\n"
        "for _ in range(10):\n"
        f"    (root / '{INDEX}').unlink(missing_ok=True)\n"
        "    assert [len(KittiSource(root, 'train').annotations(i)) for i in range(20)] == [2] * 20"
    )
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", program, str(root)]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
    KittiSource(root, "train")
    assert sorted(path.name for path in root.iterdir()) == ["ImageSets", INDEX, "training"]
