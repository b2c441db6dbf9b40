"""Bird's-eye pictures: everything is where it is, in colours that are told apart, and nothing global is touched."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from raytrain.errors import TaskError
from raytrain.tasks.pointpillars.pictures import FOUND, LABELLED, Objects, birds_eye

AREA = (0.0, -40.0, 70.4, 40.0)  # KITTI's
NONE = Objects(np.zeros((0, 7)), [])


def car(x: float, y: float, heading: float = 0.0) -> list[float]:
    return [x, y, -1.0, 4.0, 1.7, 1.5, heading]


def ground(num_points: int = 4000) -> NDArray[np.float32]:
    """(N, 4): flat ground all over the area, and one wall."""
    random = np.random.RandomState(0)
    x, y = random.uniform(0, 70, num_points), random.uniform(-40, 40, num_points)
    z = np.where(np.abs(y - 30) < 0.5, random.uniform(-1.7, 1.0, num_points), -1.7)
    return np.column_stack([x, y, z, random.uniform(0, 1, num_points)]).astype(np.float32)


def pixels(png: bytes) -> NDArray[np.float32]:
    """(H, W, 3), 0 to 1."""
    image = pytest.importorskip("matplotlib.image")
    return np.asarray(image.imread(io.BytesIO(png), format="png"))[..., :3]


def metres(png: bytes, colour: str, area: tuple[float, ...] = AREA) -> NDArray[np.float64]:
    """(K, 2): x and y of the pixels of exactly that colour within the map, whose frame is found by its own size."""
    colours = pytest.importorskip("matplotlib.colors")
    image = pixels(png)
    left, right, bottom, top = 70, 95, 60, 95  # pixels of margin
    inside = image[top : image.shape[0] - bottom, left : image.shape[1] - right]
    rows, columns = np.nonzero((np.abs(inside - np.array(colours.to_rgb(colour))) < 2 / 255).all(-1))
    x = area[2] - (rows + 0.5) / inside.shape[0] * (area[2] - area[0])
    y = area[3] - (columns + 0.5) / inside.shape[1] * (area[3] - area[1])
    return np.column_stack([x, y])


def test_a_scene_is_a_png_of_about_a_thousand_pixels() -> None:
    png = birds_eye(ground(), Objects([car(20, 5)], ["Car"]), Objects([car(20.3, 5)], ["Car"], [0.9]), AREA, "000001")
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG") and 900 <= width <= 1100 and 850 <= height <= 1100


@pytest.mark.parametrize(("x", "y"), [(10.0, 0.0), (50.0, 25.0), (50.0, -25.0)])
def test_a_box_is_drawn_where_it_is(x: float, y: float) -> None:
    """x goes up, y to the left."""
    png = birds_eye(ground(0), Objects([car(x, y)], [""]), None, AREA, "")
    found = metres(png, LABELLED)
    assert len(found) > 50
    assert np.abs(found - (x, y)).max(0) == pytest.approx((2.8, 0.85), abs=0.35)  # 0.8 beyond the front


@pytest.mark.parametrize("heading", [0.0, 0.7, np.pi / 2, np.pi, -2.0])
def test_the_heading_sticks_out_of_the_front(heading: float) -> None:
    png = birds_eye(ground(0), Objects([car(35, 0, heading)], [""]), None, AREA, "")
    offset = metres(png, LABELLED) - (35, 0)
    along = offset @ (np.cos(heading), np.sin(heading))
    assert along.max() == pytest.approx(2.8, abs=0.35) and along.min() == pytest.approx(-2.0, abs=0.35)


def test_labels_and_detections_have_colours_of_their_own() -> None:
    labelled, found = Objects([car(20, 10)], ["Car"]), Objects([car(50, -10)], ["Car"], [1.0])
    both = birds_eye(ground(), labelled, found, AREA, "")
    assert np.median(metres(both, LABELLED), axis=0) == pytest.approx((20, 10), abs=2)
    assert np.median(metres(both, FOUND), axis=0) == pytest.approx((50, -10), abs=2)
    data = birds_eye(ground(), labelled, None, AREA, "")
    assert len(metres(data, LABELLED)) and not len(metres(data, FOUND))


def test_points_are_drawn_and_higher_ones_brighter() -> None:
    drawn, empty = (pixels(birds_eye(points, NONE, None, AREA, "")) for points in (ground(20000), ground(0)))
    brightness = drawn[95:-60, 70:-95].mean(-1)  # of the map, which is 80 m wide
    assert brightness.mean() > 1.2 * empty[95:-60, 70:-95].mean()
    width = brightness.shape[1]
    wall, flat = (brightness[:, int(width * (40 - y - 0.5) / 80) : int(width * (40 - y + 0.5) / 80)] for y in (30, -30))
    assert wall.mean() > 1.2 * flat.mean()


def test_what_is_not_finite_or_outside_is_left_out() -> None:
    points = ground(100)
    points[:50] = np.nan
    detections = Objects([car(np.nan, 0), car(np.inf, 0), car(20, 400), car(20, 0)], ["Car"] * 4, [0.9, 0.8, 0.7, 1.0])
    found = metres(birds_eye(points, NONE, detections, AREA, ""), FOUND)
    assert np.median(found, axis=0) == pytest.approx((20, 0), abs=2)


def test_an_empty_scene_and_odd_names_are_drawn_too() -> None:
    nothing = np.zeros((0, 4), dtype=np.float32)
    assert birds_eye(nothing, NONE, Objects([car(5, 1)], ["$x_{"], [0.5]), (-10.0, -80.0, 10.0, 80.0), "$").startswith(
        b"\x89PNG"
    )


def test_an_area_without_extent_is_named() -> None:
    with pytest.raises(TaskError, match=r"x 70\.4 to 0\.0 .*give x0 y0 x1 y1"):
        birds_eye(ground(), NONE, None, (70.4, -40.0, 0.0, 40.0), "")


def test_the_same_scene_is_the_same_picture() -> None:
    assert len({birds_eye(ground(), Objects([car(20, 5)], ["Car"]), None, AREA, "one") for _ in range(2)}) == 1


def test_a_missing_matplotlib_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TaskError, match=r'matplotlib, which does not import .*pip install "raytrain\[pictures\]"'):
        birds_eye(ground(), NONE, None, AREA, "")


def test_pyplot_is_left_alone_and_nothing_is_loaded_before_it_is_drawn() -> None:
    code = (
        "import sys, numpy as np\n"
        "from raytrain.tasks.pointpillars.pictures import Objects, birds_eye\n"
        "before = 'matplotlib' in sys.modules\n"
        "birds_eye(np.zeros((1, 4)), Objects(np.zeros((0, 7)), []), None, (0, -1, 1, 1), '')\n"
        "print(before, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
