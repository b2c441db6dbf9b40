"""The database of objects: what is cut out of frames, what is left out, and what is kept for the next time."""

import os
import pickle

import numpy as np
import pytest
from kitti_frames import kitti_mini

from raytrain.tasks.pointpillars.database import Database, Prepare, counts, inside
from raytrain.tasks.pointpillars.frames import Calibration, Frame, annotations_of, points_in_boxes
from raytrain.tasks.pointpillars.kitti import KittiSource, difficulty_of, write_frame, write_split

CLASSES = ["Car", "Pedestrian", "Cyclist"]
# A camera in the lidar's place: x right, y down, z forward.
CALIBRATION = Calibration(
    P2=np.array([[700.0, 0, 620, 0], [0, 700, 187, 0], [0, 0, 1, 0]]),
    R0_rect=np.eye(3),
    Tr_velo_to_cam=np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0]]),
)


class Frames(list):
    """A source of frames that are no files."""

    def frame(self, index):
        return self[index]


def frame_of(name, objects):
    """A frame with (class, box, number of points in the box) each, and one point on no object."""
    boxes = np.array([box for _, box, _ in objects], dtype=np.float64).reshape(-1, 7)
    random = np.random.RandomState(len(objects))
    points = [np.array([[-5, 0, 0, 0.9]])]
    for number, box in zip([number for _, _, number in objects], boxes, strict=True):
        offset = random.uniform(-0.2, 0.2, (number, 3))
        points.append(np.column_stack([box[:3] + offset, np.full(number, 0.25)]))
    annotations = annotations_of(np.array([kind for kind, _, _ in objects], dtype=np.str_), boxes, CALIBRATION)
    return Frame(name, np.concatenate(points).astype(np.float32), annotations, CALIBRATION)


def car(x=15.0, y=0.0):
    return [x, y, -1.0, 4.0, 1.6, 1.5, 0.4]


def two_frames():
    first = [("Car", car(), 9), ("Van", car(y=8.0), 9), ("Pedestrian", [10, 3, -1, 0.8, 0.6, 1.7, 0], 4)]
    second = [("Car", car(y=-4.0), 3), ("Car", car(y=4.0), 6), ("DontCare", car(y=12.0), 6), ("Car", car(30.0), 0)]
    return Frames([frame_of("000000", first), frame_of("000001", second)])


def written(root):
    frames = two_frames()
    for frame in frames:
        write_frame(root, frame)
    write_split(root, "train", [frame.name for frame in frames])
    return KittiSource(root, "train")


def kept(root):
    return sorted(root.glob("raytrain_objects_*"))


def same(one, other):
    return one.class_names == other.class_names and all(
        np.array_equal(getattr(one, column), getattr(other, column)) for column in ("labels", "boxes", "ends", "points")
    )


def test_objects_come_with_their_points_relative_to_the_centre():
    frames = two_frames()
    database = Database.of(frames, CLASSES, Prepare())
    assert database.counts == {"Car": 3, "Pedestrian": 1, "Cyclist": 0}
    assert database.labels.tolist() == [0, 1, 0, 0]
    assert np.diff(database.ends).tolist() == [9, 4, 3, 6]
    np.testing.assert_allclose(database.boxes[0], car(), atol=1e-9)
    np.testing.assert_allclose(database.points[:9, :3], frames[0].points[1:10, :3] - car()[:3], atol=1e-6)
    np.testing.assert_array_equal(database.points[:, 3], np.float32(0.25))


def test_points_can_be_put_back_where_they_were():
    frames = two_frames()
    database = Database.of(frames, ["Car"], Prepare())
    points = database.points_of(np.array([0, 2]), database.boxes[[0, 2], :3])
    np.testing.assert_allclose(points, np.concatenate([frames[0].points[1:10], frames[1].points[4:10]]), atol=2e-6)


def test_objects_with_too_few_points_are_left_out():
    prepare = Prepare(filter_by_min_points=["Car:4", "Pedestrian:5"])
    assert Database.of(two_frames(), CLASSES, prepare).counts == {"Car": 2, "Pedestrian": 0, "Cyclist": 0}


def test_objects_of_a_difficulty_are_left_out():
    frames = two_frames()
    frames[1].annotations.truncated[:2] = [0.4, 0.6]
    assert len(Database.of(frames, ["Car"], Prepare(filter_by_difficulty=[-1]))) == 2
    assert len(Database.of(frames, ["Car"], Prepare(filter_by_difficulty=[-1, 2]))) == 1


def test_difficulty_is_as_kittis_evaluation_has_it():
    """Height, occlusion, truncation, each just within and just beyond a limit."""
    rows = [
        (40.1, 0, 0.15, 0),
        (40.0, 0, 0.0, 1),
        (50.0, 1, 0.0, 1),
        (50.0, 0, 0.16, 1),
        (25.0, 0, 0.0, -1),
        (50.0, 2, 0.0, 2),
        (26.0, 0, 0.5, 2),
        (50.0, 3, 0.0, -1),
        (50.0, 0, 0.51, -1),
    ]
    annotations = annotations_of(np.array(["Car"] * len(rows)), np.array([car()] * len(rows)), CALIBRATION)
    annotations.bbox[:, 1] = 100.0
    annotations.bbox[:, 3] = [100.0 + row[0] for row in rows]
    annotations.occluded[:] = [row[1] for row in rows]
    annotations.truncated[:] = [row[2] for row in rows]
    assert difficulty_of(annotations).tolist() == [row[3] for row in rows]
    assert difficulty_of(annotations.only(np.zeros(0, dtype=np.int64))).tolist() == []


def test_only_the_first_frames_are_read_if_asked():
    assert len(Database.of(two_frames(), ["Car"], Prepare(), num_frames=1)) == 1


def test_a_source_without_objects_gives_an_empty_database():
    database = Database.of(Frames([frame_of("000000", [])]), CLASSES, Prepare())
    assert len(database) == 0
    assert len(database.drawn("Car", 5)) == 0
    assert database.points_of(np.zeros(0, np.int64), np.zeros((0, 3))).shape == (0, 4)


def test_drawing_takes_each_object_once_and_only_of_its_class():
    database = Database.of(two_frames(), CLASSES, Prepare())
    np.random.seed(0)
    draws = {tuple(database.drawn("Car", 2)) for _ in range(100)}
    assert draws == {(i, j) for i in (0, 2, 3) for j in (0, 2, 3) if i != j}
    assert sorted(database.drawn("Car", 99)) == [0, 2, 3]


def test_counts_are_read_with_and_without_spaces():
    assert counts(["Car:5", "Person_sitting: 10"]) == {"Car": 5, "Person_sitting": 10}


def test_inside_says_what_points_in_boxes_says():
    random = np.random.RandomState(0)
    points = random.uniform(-6, 6, (4000, 4)).astype(np.float32)
    boxes = np.column_stack(
        [random.uniform(-3, 3, (30, 3)), random.uniform(0.1, 6, (30, 3)), random.uniform(-4, 4, 30)]
    )
    expected = points_in_boxes(points, boxes)
    for box, among in zip(boxes, expected, strict=True):
        np.testing.assert_array_equal(inside(points, box), np.flatnonzero(among))


def test_a_database_travels_to_a_loader_worker():
    database = Database.of(two_frames(), CLASSES, Prepare())
    assert same(pickle.loads(pickle.dumps(database)), database)


def test_what_comes_of_a_folder_is_kept_in_it_and_equal(tmp_path):
    source = written(tmp_path)
    database = Database.of(source, CLASSES, Prepare())
    (path,) = kept(tmp_path)
    for frame in (0, 1):  # from now on no point can be read, with sizes and times as before
        points = tmp_path / "training" / "velodyne" / f"00000{frame}.bin"
        stat = points.stat()
        points.write_bytes(b"\xff" * stat.st_size)
        os.utime(points, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(Database.of(source, CLASSES, Prepare()), database)
    assert kept(tmp_path) == [path]


def test_other_options_and_changed_files_are_not_taken_for_what_is_kept(tmp_path):
    source = written(tmp_path)
    assert len(Database.of(source, CLASSES, Prepare())) == 4
    assert len(Database.of(source, ["Car"], Prepare())) == 3
    assert len(Database.of(source, ["Car"], Prepare(), num_frames=1)) == 1
    assert len(Database.of(source, CLASSES, Prepare(filter_by_min_points=["Car:4"]))) == 3
    points = tmp_path / "training" / "velodyne" / "000000.bin"
    points.write_bytes(points.read_bytes()[:16])
    assert len(Database.of(KittiSource(tmp_path, "train"), CLASSES, Prepare())) == 2


@pytest.mark.parametrize("damage", [b"", b"not an archive", None])
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    source = written(tmp_path)
    database = Database.of(source, CLASSES, Prepare())
    (path,) = kept(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert same(Database.of(source, CLASSES, Prepare()), database)
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path):
    source = written(tmp_path)
    database = Database.of(source, CLASSES, Prepare())
    (path,) = kept(tmp_path)
    path.unlink()
    path.mkdir()  # no file can take its place, by root neither
    assert same(Database.of(source, CLASSES, Prepare()), database)


def test_objects_of_genuine_frames_are_found(tmp_path):
    frames = KittiSource(kitti_mini(tmp_path), "train")
    database = Database.of(Frames([frames.frame(i) for i in range(len(frames))]), CLASSES, Prepare())
    assert database.counts == {"Car": 7, "Pedestrian": 1, "Cyclist": 1}
    numbers = dict(zip(database.labels.tolist(), np.diff(database.ends).tolist(), strict=False))
    assert numbers[1] > 100 and (np.diff(database.ends) > 0).all()
