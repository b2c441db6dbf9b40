"""Configs of OpenPCDet's: how one is known, and the defaults that its users count on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytrain.config.yaml_text import Node, node_of
from raytrain.config.yaml_tree import configs_above

SECTIONS = ("CLASS_NAMES", "DATA_CONFIG", "MODEL", "OPTIMIZATION", "HOOK")  # all that OpenPCDet reads
# What the flags of its tools/train.py have for a default, where ours is another.
DEFAULTS: dict[tuple[str, str], Any] = {
    ("LOADER", "WORKERS"): 4,
    ("CHECKPOINT", "KEEP_LAST"): 30,
    ("EVAL", "EVERY"): None,
}
TASKS = {
    "openpcdet": "raytrain.tasks.openpcdet:OpenPCDetTask",
    "pointpillars": "raytrain.tasks.pointpillars.task:PointPillars",
}
PACKAGE = "pcdet/__init__.py"  # in the folder of a checkout


def is_heritage(root: Node) -> bool:
    """Whether a tree is that of a config of OpenPCDet's: its sections and none of ours, TASK aside."""
    return (
        isinstance(root.value, dict)
        and root.value.keys() <= {*SECTIONS, "TASK"}
        and all(_holds(root, *keys) for keys in (("MODEL", "NAME"), ("DATA_CONFIG", "DATASET")))
    )


def put_defaults(root: Node, path: Path) -> None:
    """The heritage's defaults in the tree of such a config, which the YAML at `path` holds.

    What trains it is OpenPCDet's own code, unless TASK says otherwise. Of one that lies in a checkout the run folders
    are where OpenPCDet has them, so that its runs are found there.
    """
    root.value.setdefault("TASK", Node(TASKS["openpcdet"], root.where))
    for (section, key), value in DEFAULTS.items():
        root.value.setdefault(section, Node({}, root.where)).value[key] = Node(value, root.where)
    tools = configs_above(path)
    if tools is not None and (tools.parent / PACKAGE).is_file():
        root.value["OUTPUT"] = node_of(str(tools.parent / "output"), root.where)


def _holds(root: Node, section: str, key: str) -> bool:
    inner = root.child(section)
    named = inner.child(key) if inner is not None else None
    return named is not None and isinstance(named.value, str)
