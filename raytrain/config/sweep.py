"""What is wrong with the sweep that a config asks for; the config without it is right."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from raytrain.config.distributions import Choices, Distribution, Range, distribution
from raytrain.config.schema import annotation_at, nearest
from raytrain.config.yaml_text import Node, node_of

Problems = list[tuple[str, str]]  # (place, what is wrong) of each

# Keys that are the same in all trials, with all below them.
FOLDERS = ("OUTPUT", "TAG", "EXP_GROUP_PATH", "EXTRA_TAG")
SIZES = ("NUM_WORKERS", "MIN_WORKERS", "GROW_EVERY", "USE_GPU", "CPUS_PER_WORKER", "GPUS_PER_WORKER", "RESOURCES")
OF_THE_SWEEP = {
    "TUNE": "a sweep has one TUNE",
    **dict.fromkeys(FOLDERS, "it names the folder that holds all trials"),
}
# Those of them that CONSTANTS may set, for all trials.
OF_EVERY_TRIAL = {
    **dict.fromkeys([f"SCALE.{key}" for key in SIZES], "each trial takes the same of the cluster"),
    "OPTIMIZATION.NUM_EPOCHS": "trials are compared epoch by epoch",
    **dict.fromkeys(("EVAL.EVERY", "EVAL.LAST_EPOCHS"), "trials are compared epoch by epoch"),
}
# What OPTIMIZATION.PHASES can change in mid-run, and so what PBT and PB2 can.
PERTURBED = ("OPTIMIZATION.LR", "OPTIMIZATION.GRAD_NORM_CLIP", "OPTIMIZATION.WEIGHT_DECAY")


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets a dotted key of a plain tree; mappings on its way are made where there is none."""
    *above, last = dotted.split(".")
    node: Any = tree
    for key in above:
        if isinstance(node, list):
            node = node[int(key)]
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)


def swept_problems(
    root: Node, tree: dict[str, Any], model: type[BaseModel], faults: Callable[[Node], Problems]
) -> Problems:
    """What is wrong with TUNE in `root`.

    tree:   the config that `root` is, defaults included, as plain values
    faults: what is wrong with a config, its TUNE not looked at
    """
    tune = tree["TUNE"]
    if not tune["SPACE"] and not tune["CONSTANTS"]:
        return []
    own = {key: value for key, value in tree.items() if key != "TUNE"}
    problems: Problems = []
    for section in ("CONSTANTS", "SPACE"):
        for path, value in tune[section].items():
            node = _at(root, section, path)
            wrong = _misplaced(path, section, tree, model)
            if not wrong and section == "SPACE":
                wrong = _unsuited(path, distribution(value), tune)
            if wrong:
                problems.append((node.where, f"TUNE.{section}.{path}: {wrong}"))
                continue
            values = [value] if section == "CONSTANTS" else distribution(value).examples()
            refused, own_with = _refused(own, path, values, node.where, faults)
            problems += [(where, f"TUNE.{section}: {line}") for where, line in refused]
            own = own_with if section == "CONSTANTS" and not refused else own
    return problems


def _at(root: Node, *keys: str) -> Node:
    """The node of a key of TUNE, which is there."""
    node = root
    for key in ("TUNE", *keys):
        child = node.child(key)
        assert child is not None
        node = child
    return node


def _refused(
    tree: dict[str, Any], path: str, values: list[Any], where: str, faults: Callable[[Node], Problems]
) -> tuple[Problems, dict[str, Any]]:
    """What the schema says to the first of `values` that it refuses at `path`, and the tree with the last one tried."""
    other = copy.deepcopy(tree)
    for value in values:
        put(other, path, value)
        problems = faults(node_of(other, where))
        if problems:
            fraction = isinstance(value, float) and not value.is_integer() and "whole number" in problems[0][1]
            hint = "; draw it from randint, or from quniform with a whole step" if fraction else ""
            return [(place, line + hint) for place, line in problems], other
    return [], other


def _misplaced(path: str, section: str, tree: dict[str, Any], model: type[BaseModel]) -> str:
    """Why a sweep cannot set this key there, or nothing."""
    fixed = OF_THE_SWEEP if section == "CONSTANTS" else {**OF_EVERY_TRIAL, **OF_THE_SWEEP}
    for shared, why in fixed.items():
        if f"{path}.".startswith(f"{shared}.") or shared.startswith(f"{path}."):
            return f"all trials have the same {shared}: {why}"
    tune = tree["TUNE"]
    for other in (*tune["CONSTANTS"], *tune["SPACE"]):
        if path.startswith(other + "."):
            return f"it lies in {other}, which the sweep sets as a whole; keep one of them"
    if section == "SPACE" and path in tune["CONSTANTS"]:
        return "CONSTANTS has it too; keep one of them"
    return _unknown(path, tree, model)


def _unknown(path: str, tree: dict[str, Any], model: type[BaseModel]) -> str:
    """That neither the schema nor the config knows this key, and what was probably meant; nothing if one does."""
    keys = path.split(".")
    node = node_of(tree, "")
    for depth, key in enumerate(keys):
        child = node.child(key)
        if child is not None:
            node = child
            continue
        above = ".".join(keys[:depth])
        if isinstance(node.value, list):
            return f"the config has no {path}; {above} is a list of {len(node.value)}"
        if annotation_at(model, keys) is not None:
            return ""
        known = list(node.value) if isinstance(node.value, dict) else []
        near = [f"{above}.{name}".lstrip(".") for name in difflib.get_close_matches(key, known, n=1)]
        meant = [".".join([name, *keys[depth + 1 :]]) for name in near] or nearest(path, model)
        has = f"; {above} has {', '.join(known) or 'no keys'}" if above else ""
        return f"the config has no {path}" + (f"; did you mean {' or '.join(meant)}?" if meant else has)
    return ""


def _unsuited(path: str, drawn: Distribution, tune: dict[str, Any]) -> str:
    """Why the search or the scheduler cannot do with this entry, or nothing."""
    search, scheduler = tune["SEARCH"], tune["SCHEDULER"]
    grid = isinstance(drawn, Choices) and drawn.crossed
    if search == "grid" and not isinstance(drawn, Choices):
        return "SEARCH grid takes lists only; write grid, or set SEARCH to random, which crosses grids with the rest"
    if search in ("tpe", "gp") and grid:
        return f"SEARCH {search} chooses each value itself; write choice in place of grid"
    if scheduler in ("pbt", "pb2") and path not in PERTURBED:
        return f"SCHEDULER {scheduler} changes keys in mid-run, and can change {', '.join(PERTURBED)} only"
    if scheduler == "pb2" and not isinstance(drawn, Range):
        [kind] = tune["SPACE"][path]
        return f"SCHEDULER pb2 takes ranges only (found {kind}); write uniform or loguniform"
    return ""
