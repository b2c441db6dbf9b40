"""KITTI's folders: `training/velodyne`, `label_2` and `calib`, and `ImageSets`; images are not needed.

Formats as in the object development kit (Geiger et al., CVPR 2012). What cannot be read is a DataError
that names the frame, the file and the line.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import DataError
from raytrain.tasks.pointpillars.array_cache import Arrays, cached_arrays
from raytrain.tasks.pointpillars.frames import DIFFICULTIES, Annotations, Calibration, Frame

POINT_BYTES = 16  # x y z reflectance, float32 each
LABEL_VALUES = 14  # after the name; a detection's line ends with its score
MATRICES = {"P2": (3, 4), "R0_rect": (3, 3), "Tr_velo_to_cam": (3, 4)}
LABEL_FIELDS = ("names", "truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y")


class KittiSource:
    """The frames that `ImageSets/<split>.txt` names, in its order.

    Labels and calibrations are read and checked when the source is made; what their files say is kept, as
    arrays, in `raytrain_index_<split>.npz`. Points are read when their frame is asked for.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = Path(root)
        self.names = read_split(self.root, split)
        files = [FrameFiles.of(self.root, name) for name in self.names]
        kept = self.root / f"raytrain_index_{split}.npz"
        self._index = cached_arrays(kept, _digest(files), functools.partial(_index, files))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def annotations(self, index: int) -> Annotations:
        first, end = self._index["starts"][index], self._index["starts"][index + 1]
        return Annotations(**{field: self._index[field][first:end] for field in LABEL_FIELDS})

    def frame(self, index: int) -> Frame:
        points = read_points(files_of(self.root, self.names[index])["velodyne"])
        calibration = Calibration(**{matrix: self._index[matrix][index] for matrix in MATRICES})
        return Frame(self.names[index], points, self.annotations(index), calibration)


@dataclasses.dataclass(frozen=True)
class FrameFiles:
    """What the index of a frame is made of: the bytes of its small files, and how long the large one is."""

    paths: dict[str, Path]
    label: bytes
    calibration: bytes
    points_bytes: int

    @classmethod
    def of(cls, root: Path, name: str) -> FrameFiles:
        paths = files_of(root, name)
        try:
            size = paths["velodyne"].stat().st_size
            found = cls(paths, paths["label_2"].read_bytes(), paths["calib"].read_bytes(), size)
        except OSError as error:
            raise DataError(
                f"frame {name}: {error.filename} cannot be read: {error.strerror}\nEvery frame of a split needs "
                f"velodyne/{name}.bin, label_2/{name}.txt and calib/{name}.txt in {root / 'training'}"
            ) from error
        check_points_bytes(paths["velodyne"], size)
        return found


def _digest(files: list[FrameFiles]) -> str:
    """Of all that an index depends on, and of how it is laid out."""
    digest = hashlib.blake2b(f"index 1 of {len(files)} frames".encode(), digest_size=16)
    for frame in files:
        sizes = (len(frame.label), len(frame.calibration), frame.points_bytes)
        digest.update(f"{frame.paths['velodyne'].stem!r} {sizes}".encode() + frame.label + frame.calibration)
    return digest.hexdigest()


def _index(files: list[FrameFiles]) -> Arrays:
    """Labels of all frames one after another, where those of each begin, and a stack of each matrix."""
    labels = [parse_labels(frame.label, frame.paths["label_2"]) for frame in files]
    calibrations = [parse_calibration(frame.calibration, frame.paths["calib"]) for frame in files]
    return {
        "starts": np.cumsum([0, *map(len, labels)]),
        **{field: np.concatenate([getattr(one, field) for one in labels]) for field in LABEL_FIELDS},
        **{matrix: np.stack([getattr(one, matrix) for one in calibrations]) for matrix in MATRICES},
    }


def read_split(root: Path, split: str) -> list[str]:
    """The names of the frames of a split."""
    path = root / "ImageSets" / f"{split}.txt"
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}\n"
            f"It lists the frames of split {split!r}, one name a line. DATA_CONFIG.DATA_PATH is the folder with\n"
            "ImageSets and training in it, DATA_CONFIG.DATA_SPLIT says which lists to use"
        ) from error
    names = []
    for number, words in enumerate(map(str.split, lines), 1):
        if len(words) > 1 or not all(re.fullmatch(r"\w[\w.-]*", word) for word in words):
            raise DataError(
                f"{path}:{number}: {' '.join(words)!r} is no frame's name, as 000042 is; one stands in a line"
            )
        names += words
    if not names:
        raise DataError(f"{path} names no frame; it must list the frames of split {split!r}, one name a line")
    return names


def read_points(path: Path) -> NDArray[np.float32]:
    """(N, 4) float32: x y z in metres, lidar, and reflectance."""
    try:
        values = np.fromfile(path, dtype="<f4")
    except OSError as error:
        raise DataError(f"frame {path.stem}: {path} cannot be read: {error.strerror}") from error
    check_points_bytes(path, path.stat().st_size)
    points = values.reshape(-1, 4)
    if not np.isfinite(points).all():
        bad = int(np.flatnonzero(~np.isfinite(points).all(1))[0])
        raise DataError(f"frame {path.stem}: {path}: point {bad} is {points[bad].tolist()}; all must be finite")
    return points


def check_points_bytes(path: Path, size: int) -> None:
    if size == 0 or size % POINT_BYTES:
        raise DataError(
            f"frame {path.stem}: {path} has {size} bytes; points take {POINT_BYTES} each (x y z reflectance, float32), "
            "and there must be one at least. Copy it again"
        )


def read_labels(path: Path) -> Annotations:
    return parse_labels(path.read_bytes(), path)


def parse_labels(content: bytes, path: Path) -> Annotations:
    """The objects of a label file, or of a file of detections: then with scores."""
    names: list[str] = []
    rows: list[list[float]] = []
    for number, words in _lines(content, path):
        width = LABEL_VALUES if not rows else len(rows[0])
        if len(words) - 1 != width and (rows or len(words) - 1 != LABEL_VALUES + 1):
            other = ", as in the lines above it" if rows else f", or {width + 2} with a score"
            raise _malformed(path, number, f"has {len(words)} values; an object has {width + 1}{other}")
        names.append(words[0])
        rows.append(_numbers(words[1:], path, number))
    table = np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else LABEL_VALUES)
    return Annotations(
        names=np.array(names, dtype=np.str_),
        truncated=table[:, 0],
        occluded=table[:, 1],
        alpha=table[:, 2],
        bbox=table[:, 3:7],
        dimensions=table[:, [9, 7, 8]],
        location=table[:, 10:13],
        rotation_y=table[:, 13],
        scores=table[:, 14] if table.shape[1] > LABEL_VALUES else None,
    )


def write_labels(path: Path, annotations: Annotations) -> None:
    """A label file, its numbers with two decimals; of detections with four, and the score.

    Numbers of two decimals read back as the same bits.
    """
    digits = 2 if annotations.scores is None else 4
    length, height, width = annotations.dimensions.T
    before = np.column_stack([annotations.alpha, annotations.bbox])
    after = np.column_stack([height, width, length, annotations.location, annotations.rotation_y])
    if annotations.scores is not None:
        after = np.column_stack([after, annotations.scores])
    lines = []
    for i, name in enumerate(annotations.names):
        whole = name == "DontCare"  # whose whole numbers KITTI writes without decimals
        words = [str(name), _word(annotations.truncated[i], digits, whole), _word(annotations.occluded[i], 0)]
        words += [_word(value, digits, whole) for value in (*before[i], *after[i])]
        lines.append(" ".join(words) + "\n")
    path.write_text("".join(lines))


def read_calibration(path: Path) -> Calibration:
    return parse_calibration(path.read_bytes(), path)


def parse_calibration(content: bytes, path: Path) -> Calibration:
    found: dict[str, NDArray[np.float64]] = {}
    for number, (first, *words) in _lines(content, path):
        name = first.removesuffix(":")
        shape = MATRICES.get(name)
        if shape is None:
            continue
        if len(words) != math.prod(shape):
            raise _malformed(
                path, number, f"has {len(words)} numbers for {name}; it is a {shape[0]} x {shape[1]} matrix"
            )
        matrix = np.array(_numbers(words, path, number)).reshape(shape)
        if np.linalg.matrix_rank(matrix[:, :3]) < 3:
            raise _malformed(path, number, f"has a singular matrix {name}, which cannot be a camera's")
        found[name] = matrix
    for name in MATRICES:
        if name not in found:
            raise DataError(f"frame {path.stem}: {path} has no line {name}:, which says where the camera is")
    return Calibration(**found)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """A calibration file that reads back as the same bits.

    The other cameras are given P2 and the inertial unit none of its own: OpenPCDet finds lines by their number.
    """
    of = {
        **dict.fromkeys(("P0", "P1", "P2", "P3"), calibration.P2),
        "R0_rect": calibration.R0_rect,
        "Tr_velo_to_cam": calibration.Tr_velo_to_cam,
        "Tr_imu_to_velo": np.eye(3, 4),
    }
    lines = [f"{name}: {' '.join(f'{value:.16e}' for value in matrix.flat)}\n" for name, matrix in of.items()]
    path.write_text("".join(lines))


def files_of(root: Path, name: str) -> dict[str, Path]:
    """The files of one frame, by the folder that each is in."""
    suffixes = {"velodyne": "bin", "label_2": "txt", "calib": "txt"}
    return {folder: root / "training" / folder / f"{name}.{suffix}" for folder, suffix in suffixes.items()}


def write_frame(root: Path, frame: Frame) -> None:
    """The three files of `frame` below `root`; `write_split` says last which frames there are."""
    files = files_of(root, frame.name)
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    frame.points.astype("<f4").tofile(files["velodyne"])
    write_labels(files["label_2"], frame.annotations)
    write_calibration(files["calib"], frame.calibration)


def write_split(root: Path, split: str, names: list[str]) -> None:
    path = root / "ImageSets" / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def difficulty_of(annotations: Annotations) -> NDArray[np.int64]:
    """(M,): 0 easy, 1 moderate, 2 hard, the least that each object is; -1 where it is none of them."""
    height = annotations.bbox[:, 3] - annotations.bbox[:, 1]
    difficulty = np.full(len(annotations), -1)
    for level, limits in reversed(list(enumerate(DIFFICULTIES))):
        meets = (height > limits.height) & (annotations.occluded <= limits.occluded)
        difficulty[meets & (annotations.truncated <= limits.truncated)] = level
    return difficulty


def _word(value: float, digits: int, whole: bool = False) -> str:
    return f"{value:.{0 if whole and float(value).is_integer() else digits}f}"


def _lines(content: bytes, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The words of each line that has any, and its number."""
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            words = line.decode("ascii").split()
        except UnicodeDecodeError as error:
            raise _malformed(path, number, f"is not text ({error.reason}); copy the file again") from error
        if words:
            yield number, words


def _numbers(words: list[str], path: Path, number: int) -> list[float]:
    for word in words:
        try:
            finite = math.isfinite(float(word))
        except ValueError:
            finite = False
        if not finite:
            raise _malformed(path, number, f"has {word!r} where a number must be")
    return [float(word) for word in words]


def _malformed(path: Path, number: int, told: str) -> DataError:
    return DataError(f"frame {path.stem}: {path}:{number}: the line {told}")
