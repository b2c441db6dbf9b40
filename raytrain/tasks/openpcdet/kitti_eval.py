"""pcdet's KITTI evaluation (`kitti_object_eval_python.eval`) by PointPillars' own, which needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raytrain.tasks.pointpillars.frames import DIFFICULTIES, Annotations
from raytrain.tasks.pointpillars.kitti_eval import evaluate

NAMES = ("Car", "Pedestrian", "Cyclist", "Van", "Person_sitting", "Truck")  # by their number there
MEASURES = ("image", "bev", "3d", "aos")


def get_official_eval_result(
    gt_annos: Sequence[Mapping[str, Any]],
    dt_annos: Sequence[Mapping[str, Any]],
    current_classes: Sequence[Any] | str,
    PR_detail_dict: dict[str, Any] | None = None,  # noqa: N803 theirs
) -> tuple[str, dict[str, float]]:
    """A table of average precisions in percent, and those at 40 points of recall by name: `Car_3d/moderate_R40`.

    Orientation (`aos`) only where the first frame with an object has an angle, as there.
    """
    classes = [current_classes] if isinstance(current_classes, str | int) else current_classes
    names = [NAMES[each] if isinstance(each, int) else str(each) for each in classes]
    found = evaluate([_annotations(each) for each in gt_annos], [_annotations(each) for each in dt_annos], names)
    angles = [anno["alpha"][0] for anno in dt_annos if len(anno["alpha"])]
    measures = MEASURES if angles and angles[0] != -10 else MEASURES[:3]
    lines = []
    for name in names:
        for points, suffix in (("AP_R11", "R11"), ("AP_R40", "R40")):
            for loose in ("", "_loose"):
                kept = [m for m in measures if not loose or m in ("bev", "3d")]
                lines.append(f"{name} {points}{' at the smaller overlap' if loose else ''}: easy, moderate, hard")
                for measure in kept:
                    values = [found[f"{name}_{measure}/{each.name}{loose}_{suffix}"] for each in DIFFICULTIES]
                    lines.append(f"{measure:5s} AP: " + ", ".join(f"{value:.4f}" for value in values))
    metrics = {
        f"{name}_{measure}/{each.name}_R40": found[f"{name}_{measure}/{each.name}_R40"]
        for name in names
        for measure in measures
        for each in DIFFICULTIES
    }
    return "\n".join(lines) + "\n", metrics


def _annotations(anno: Mapping[str, Any]) -> Annotations:
    names = np.asarray(anno["name"]).astype(str).reshape(-1)
    columns = {key: np.asarray(anno[key], dtype=np.float64).reshape(len(names)) for key in ("alpha", "rotation_y")}
    for key in ("truncated", "occluded"):
        columns[key] = np.asarray(anno.get(key, np.zeros(len(names))), dtype=np.float64).reshape(len(names))
    wide = {key: np.asarray(anno[key], dtype=np.float64).reshape(len(names), n) for key, n in WIDE.items()}
    scores = np.asarray(anno["score"], dtype=np.float64).reshape(len(names)) if "score" in anno else None
    return Annotations(names, **columns, **wide, scores=scores)


WIDE = {"bbox": 4, "dimensions": 3, "location": 3}
