"""Bird's-eye pictures of LiDAR scenes: the points, what is labelled there, and what was found."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raytrain.errors import TaskError
from raytrain.tasks.pointpillars.frames import corners

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUND, GRID, TEXT = "#0d1117", "#2b3440", "#c9d1d9"
LABELLED, FOUND = "#3ddc84", "#ff9f1c"  # green and orange: apart for the colour-blind too, by their lightness
HEIGHTS = ["#3d62a0", "#5f8fc9", "#a9c8e8", "#f4f9ff"]  # low to high; no hue that a box has
PIXELS_PER_INCH = 100
LONG_SIDE = 9.0  # inches, of the map
MARGINS = (0.7, 0.95, 0.6, 0.95)  # inches, left, right, bottom, top


@dataclasses.dataclass(frozen=True)
class Objects:
    """Labelled objects, or detected ones, which have scores.

    boxes:  (M, 7), lidar: x y z dx dy dz heading, metres and radians
    names:  (M,) class names
    scores: (M,), 0 to 1
    """

    boxes: ArrayLike
    names: Sequence[str]
    scores: ArrayLike | None = None

    def rows(self, area: Sequence[float]) -> list[tuple[NDArray[np.float64], str, float | None]]:
        """(box, name, score) of those whose centre lies in `area` and whose numbers are finite, best score last."""
        boxes = np.asarray(self.boxes, dtype=np.float64).reshape(-1, 7)
        scores = [None] * len(boxes) if self.scores is None else [float(s) for s in np.asarray(self.scores).ravel()]
        rows = list(zip(boxes, map(str, self.names), scores, strict=True))
        x0, y0, x1, y1 = area
        rows = [row for row in rows if np.isfinite(row[0]).all() and x0 <= row[0][0] <= x1 and y0 <= row[0][1] <= y1]
        return sorted(rows, key=lambda row: row[2] or 0.0)


def birds_eye(
    points: ArrayLike, ground_truth: Objects, detections: Objects | None, area: Sequence[float], title: str
) -> bytes:
    """A PNG of a scene from above, about 1000 pixels on its longer side: x goes up, y to the left, as the sensor looks.

    points:     (N, 3 or more), lidar, metres; brighter is higher
    detections: drawn over the ground truth, the fainter the lower their scores; None where nothing was searched for
    area:       x0 y0 x1 y1 in metres: what is shown
    """
    area = [float(edge) for edge in area]
    figure, axes = _map(area, title)
    _draw_points(axes, np.asarray(points), area)
    labelled = ground_truth.rows(area)
    for box, name, _ in labelled:
        _draw_box(axes, box, LABELLED, width=2.4, opacity=1.0)
        _write(axes, box, name, LABELLED, below=True)
    entries = [(f"ground truth ({len(labelled)})", LABELLED)]
    if detections is not None:
        found = detections.rows(area)
        for box, name, score in found:
            opacity = 1.0 if score is None else 0.3 + 0.7 * min(max(score, 0.0), 1.0)
            _draw_box(axes, box, FOUND, width=1.3, opacity=opacity)
            _write(axes, box, name if score is None else f"{name} {score:.2f}", FOUND, opacity=opacity)
        entries.append((f"detections with scores ({len(found)})", FOUND))
    _draw_legend(axes, entries)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=GROUND)
    return buffer.getvalue()


def _map(area: Sequence[float], title: str) -> tuple[Figure, Axes]:
    """An empty map of `area` with metric axes, rings of distance, and the sensor. Nothing global is touched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle
    except ImportError as error:
        raise TaskError(
            f"pictures are drawn with matplotlib, which does not import here ({error}); "
            'get it with: pip install "raytrain[pictures]"'
        ) from error
    x0, y0, x1, y1 = area
    if not (x1 > x0 and y1 > y0):
        raise TaskError(f"a picture of x {x0} to {x1} and y {y0} to {y1} has no extent; give x0 y0 x1 y1 in metres")
    inches = LONG_SIDE / max(x1 - x0, y1 - y0)
    width, height = max((y1 - y0) * inches, 4.0), max((x1 - x0) * inches, 2.0)  # the legend fits
    left, right, bottom, top = MARGINS
    total = (left + width + right, bottom + height + top)
    figure = Figure(figsize=total, dpi=PIXELS_PER_INCH)
    FigureCanvasAgg(figure)
    place = (left / total[0], bottom / total[1], width / total[0], height / total[1])
    axes = figure.add_axes(place, facecolor=GROUND, aspect="equal", xlim=(y1, y0), ylim=(x0, x1))
    axes.set_title(title, color=TEXT, fontsize=13, loc="left", pad=30, parse_math=False)
    axes.set_xlabel("y (m), to the left", color=TEXT)
    axes.set_ylabel("x (m), ahead", color=TEXT)
    axes.tick_params(colors=TEXT, length=0, pad=7)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    for radius in range(10, int(np.hypot(max(abs(x0), abs(x1)), max(abs(y0), abs(y1)))) + 1, 10):
        axes.add_patch(Circle((0.0, 0.0), radius, fill=False, color=GRID, linewidth=0.8, linestyle=":", zorder=0))
    axes.plot([0.0], [0.0], marker="^", markersize=9, color=TEXT, clip_on=False, zorder=6)
    return figure, axes


def _draw_points(axes: Axes, points: NDArray[np.floating], area: Sequence[float]) -> None:
    """The points in `area`, low ones first, and the scale of their heights."""
    from matplotlib.colors import LinearSegmentedColormap

    x0, y0, x1, y1 = area
    inside = (points[:, 0] >= x0) & (points[:, 0] <= x1) & (points[:, 1] >= y0) & (points[:, 1] <= y1)
    points = points[inside & np.isfinite(points[:, 2])]
    points = points[np.argsort(points[:, 2], kind="stable")]
    low, high = np.percentile(points[:, 2], [2, 98]) if len(points) else (0.0, 1.0)
    drawn = axes.scatter(
        points[:, 1],
        points[:, 0],
        c=points[:, 2],
        cmap=LinearSegmentedColormap.from_list("heights", HEIGHTS),
        vmin=low,
        vmax=max(high, low + 1.0),  # metres: flat ground is one colour
        s=1.5,
        marker="o",
        linewidths=0,
        zorder=1,
    )
    scale = axes.inset_axes((1.015, 0.0, 0.015, 0.3))
    bar = axes.figure.colorbar(drawn, cax=scale)
    bar.set_label("height (m)", color=TEXT, fontsize=9)
    bar.ax.tick_params(colors=TEXT, labelsize=8, length=0)
    bar.outline.set_visible(False)


def _draw_box(axes: Axes, box: NDArray[np.float64], colour: str, width: float, opacity: float) -> None:
    """The outline from above, and a stroke from the middle to beyond the front: the heading."""
    from matplotlib.patches import Polygon

    middle, length, heading = box[:2], box[3], box[6]
    ahead = np.array([np.cos(heading), np.sin(heading)])
    outline = corners(box[None])[0, :4, :2]
    style: dict[str, Any] = {"edgecolor": colour, "linewidth": width, "joinstyle": "miter", "zorder": 4}
    axes.add_patch(Polygon(outline[:, ::-1], closed=True, facecolor="none", alpha=opacity, **style))
    axes.add_patch(Polygon(outline[:, ::-1], closed=True, facecolor=colour, alpha=0.15 * opacity, zorder=3))
    nose = np.array([middle, middle + (length / 2 + 0.8) * ahead])  # metres beyond: seen on a pedestrian too
    axes.plot(nose[:, 1], nose[:, 0], color=colour, linewidth=width, alpha=opacity, zorder=4, solid_capstyle="butt")


def _write(
    axes: Axes, box: NDArray[np.float64], text: str, colour: str, below: bool = False, opacity: float = 1.0
) -> None:
    """`text` beside the box: above it on the picture, or below, so that a label and what was found there both show."""
    from matplotlib.patheffects import withStroke

    reach = (abs(box[3] * np.cos(box[6])) + abs(box[4] * np.sin(box[6]))) / 2 + 0.9
    axes.text(
        box[1],
        box[0] - reach if below else box[0] + reach,
        text,
        color=colour,
        alpha=max(opacity, 0.6),
        fontsize=7.5,
        ha="center",
        va="top" if below else "bottom",
        clip_on=True,
        zorder=5,
        parse_math=False,
        path_effects=[withStroke(linewidth=2, foreground=GROUND)],  # readable over points
    )


def _draw_legend(axes: Axes, entries: list[tuple[str, str]]) -> None:
    """Between title and map, where it hides nothing."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2.4, label=label) for label, colour in entries]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.3,
        borderpad=0.1,
        ncols=len(handles),
        frameon=False,
        labelcolor=TEXT,
        fontsize=10,
    )
